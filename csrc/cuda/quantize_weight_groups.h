// Many latent weights to prepacked ternary codes at once, each with its own scale.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// The table travels in the kernel's parameters, as in adam.h.
struct WeightTable {
  static constexpr int kMaxWeights = 84;
  const void* weight[kMaxWeights];   // [N, K]
  void* prepacked[kMaxWeights];      // this weight's blocks of csrc/prepacked.h, 16-byte aligned
  float* weight_scale[kMaxWeights];  // []
  int32_t N[kMaxWeights];
  int32_t K[kMaxWeights];
  uint32_t partials_end[kMaxWeights];  // partial sums of this weight and all before it in the table
  uint32_t block_end[kMaxWeights];     // thread blocks of the second launch, likewise
  int count;
};

// How many blocks of 16 x 128 a warp makes when all weights together have so many.
int quantize_rounds(int64_t layout_blocks, int num_sms);

// Thread blocks that quantise a weight [N, K].
uint32_t quantize_blocks(int64_t N, int64_t K, int rounds);

// partials[i] = the partial sums of |w| of quantize_weight.h, of all weights of the table in a row.
cudaError_t launch_abs_sums(
    const WeightTable& table, DType dtype, double* partials, bool dependent, cudaStream_t stream);

// Codes and scales from these sums.
cudaError_t launch_quantize_weights(
    const WeightTable& table, DType dtype, const double* partials, bool dependent, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
