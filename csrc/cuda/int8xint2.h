// The product of int8 activations and packed ternary weights: what the GEMV and the GEMM share.
//
//   acc[m, n] = sum_k x_i8[m, k] * code[n, k]                                   exact, int32
//   y[m, n]   = ((float)acc * act_scale[m]) * weight_scale[n] + bias[n]         each step rounded in fp32
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

constexpr int kMaxSegments = 16;

struct Int8xInt2Args {
  const int8_t* x_i8;     // [M, K]
  const uint8_t* packed;  // [N, ceil(K / 4)]
  int64_t M, N, K;

  bool raw;   // write acc as int32 [M, N] and ignore everything below but `out`
  void* out;  // [M, N], int32 or of `out_dtype`
  DType out_dtype;
  const float* act_scale;     // [M]
  const float* weight_scale;  // [num_segments], or [N] when scale_per_row
  const float* bias;          // [N] or null
  bool scale_per_row;
  int num_segments;                   // 1 .. kMaxSegments
  int64_t segment_end[kMaxSegments];  // first row beyond each segment; the last is N
};

// The largest M the GEMV handles; beyond it dp4a, not memory, is what a GEMV waits for.
constexpr int kGemvMaxM = 8;

cudaError_t launch_int8xint2_gemv(const Int8xInt2Args& args, int num_sms, cudaStream_t stream);
cudaError_t launch_sm80_int8xint2_gemm(const Int8xInt2Args& args, int num_sms, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
