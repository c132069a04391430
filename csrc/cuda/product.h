// The product of int8 activations and prepacked weights: what its kernels and its operators share.
//
//   acc[m, n] = sum_k x_i8[m, k] * w[n, k]                                      exact, int32
//   y[m, n]   = ((float)acc * act_scale[m]) * weight_scale[n] + bias[n]         each step rounded in fp32
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/dtype.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {

constexpr int kMaxSegments = 16;

struct ProductArgs {
  const int8_t* x_i8;  // [M, K]
  const void* weight;  // prepacked [ceil(N / 16), ceil(K / 128)] blocks, 16-byte aligned
  WeightKind kind;
  int64_t M, N, K;

  bool raw;   // write acc as int32 [M, N] and ignore the scales and the bias
  void* out;  // [M, N], int32 or of `out_dtype`
  DType out_dtype;
  const float* act_scale;     // [M]
  const float* weight_scale;  // [num_segments], or [N] when scale_per_row
  const float* bias;          // [N] or null
  bool scale_per_row;
  int num_segments;                   // 1 .. kMaxSegments
  int64_t segment_end[kMaxSegments];  // first row beyond each segment; the last is N

  // The device can start this kernel while the one before it in the stream drains (sm_90 and newer).
  bool dependent_launch;
  // The kernel before this one in the stream does not write the weights, so they may be read before it ends.
  bool weight_is_constant;

  // sm90_gemm with tiles split over blocks; null otherwise.
  int32_t* partials;  // [blocks, tile elements], uninitialised
  uint32_t* flags;    // [blocks], zero before and after the launch
};

constexpr bool is_ternary(const ProductArgs& args) {
  return args.kind == WeightKind::kTernary;
}

}  // namespace bitnet_ext::cuda
