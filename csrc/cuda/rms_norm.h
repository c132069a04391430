// Backward of the RMS norm y = (x * rstd) * gain.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct RmsNormBackwardArgs {
  const void* grad_y;  // [M, K] of `grad_dtype`
  DType grad_dtype;
  const void* x;  // [M, K] of `x_dtype`
  DType x_dtype;
  const float* gain;  // [K] or null
  const float* rstd;  // [M]
  int64_t M, K;
  void* grad_x;      // [M, K] of `x_dtype`
  float* partials;   // [gain_row_blocks(M), K], workspace; null when gain_row_blocks(M) is 1
  float* grad_gain;  // [K]; null without a gain
};

// Blocks of rows whose sums are added in order at the end: a function of M only, so that the result does not
// depend on the device.
constexpr int64_t gain_row_blocks(int64_t M) {
  constexpr int64_t kRowsPerBlock = 256;
  return M <= kRowsPerBlock ? 1 : (M + kRowsPerBlock - 1) / kRowsPerBlock;
}

cudaError_t launch_rms_norm_backward(const RmsNormBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
