// The RMS norm y = (s * rstd) * gain, of s = x or x + delta, and its backward.
#pragma once

#include <cuda_runtime.h>

#include "cuda/norm_backward.h"

namespace bitnet_ext::cuda {

struct RmsNormArgs {
  TypedRows x;        // [M, K]
  TypedRows delta;    // [M, K], or absent
  TypedRows sum;      // [M, K] of x's type; with delta
  TypedRows y;        // [M, K] of x's type
  const float* gain;  // [K] or null
  double eps;
  int64_t M, K;
  float* rstd;  // [M]
  bool dependent_launch;
};

cudaError_t launch_rms_norm(const RmsNormArgs& args, cudaStream_t stream);

struct RmsNormBackwardArgs {
  NormBackwardArgs norm;
  TypedRows x;              // [M, K]
  TypedRows grad_residual;  // [M, K], or absent
  TypedRows grad_x;         // [M, K]
  TypedRows grad_delta;     // [M, K], or absent
};

cudaError_t launch_rms_norm_backward(const RmsNormBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
