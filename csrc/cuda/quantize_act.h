// Activations to int8, a row at a time, with or without the RMS norm in front, and a residual in front of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// Fields that stay zero mean: without it.
struct QuantizeActArgs {
  const void* x;  // [M, K] of `dtype`
  DType dtype;
  const float* gain;  // [K] or null; read only when normalize is set
  double eps;         // of the norm
  bool normalize;
  int64_t M, K;
  int8_t* x_i8;      // [M, K]
  float* act_scale;  // [M]
  float* rstd;       // [M] or null, written only when normalize is set
  // With a residual the row is x + residual, rounded to `dtype`, and also written.
  const void* residual;  // [M, K] of `residual_dtype`, or null
  DType residual_dtype;  // `dtype`, or a 16-bit type where that is fp32
  void* sum;             // [M, K] of `dtype`
  bool dependent_launch;
};

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
