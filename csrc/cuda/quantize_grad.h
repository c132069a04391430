// The 8-bit forms of an output gradient: csrc/cuda/quantize_grad.cu, and int8_gradient.h for their units.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

struct QuantizeGradArgs {
  const void* grad;  // [M, N] of dtype, rows of N
  DType dtype;
  int64_t M, N;
  const float* act_scale;     // [M]
  const float* weight_scale;  // [num_segments], or [N] when scale_per_row
  bool scale_per_row;
  int num_segments;                   // 1 .. kMaxSegments
  int64_t segment_end[kMaxSegments];  // first column beyond each segment; the last is N
  const int64_t* seed;                // one value

  // By rows, for the gradient of the activations; null codes: not wanted.
  int8_t* by_row;    // [M, N]
  float* row_scale;  // [M]
  // By columns, for the gradient of the weights; null codes: not wanted.
  int8_t* by_column;   // [N, padded_tokens(M)]
  int32_t* order;      // [padded_tokens(M)]: the token in each place, -1 beyond M
  float* stage_bound;  // [padded_tokens(M) / kStageTokens]
  float* column_max;   // [N]

  uint32_t* row_max;    // [M] bits of max |g| weight_scale, workspace
  uint32_t* token_max;  // [M] bits of max |g| act_scale, workspace directly behind row_max
};

cudaError_t launch_quantize_grad(const QuantizeGradArgs& args, bool dependent, cudaStream_t stream);

// Its part that makes order and stage_bound from token_max.
cudaError_t launch_order_tokens(const QuantizeGradArgs& args, bool dependent, cudaStream_t stream);

// int8 [M, K] -> [K, width]: column j of the result is row order[j], zeros where that is negative. `order`
// null: the rows as they are.
cudaError_t launch_transpose_int8(const int8_t* x,
                                  int64_t M,
                                  int64_t K,
                                  const int32_t* order,
                                  int64_t width,
                                  int8_t* out,
                                  cudaStream_t stream);

// Prepacked ternary [N, K] -> prepacked ternary [K, N].
cudaError_t launch_transpose_prepacked(
    const void* prepacked, int64_t N, int64_t K, void* out, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
