// Activations to int8, a row at a time, with or without the RMS norm in front.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct QuantizeActArgs {
  const void* x;  // [M, K] of `dtype`
  DType dtype;
  const float* gain;  // [K] or null; read only when normalize is set
  double eps;         // of the norm
  bool normalize;
  int64_t M, K;
  int8_t* x_i8;      // [M, K]
  float* act_scale;  // [M]
  float* rstd;       // [M], written only when normalize is set
};

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
