// The gated product of a feed-forward block to int8, a row at a time, with or without the RMS norm in front.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

enum class GluActivation { kRelu2, kSilu };

struct GluQuantizeArgs {
  const void *gate, *up;           // [M, K] of `dtype`
  int64_t gate_stride, up_stride;  // elements from row to row
  DType dtype;
  GluActivation activation;
  const float* gain;  // [K] or null; read only when normalize is set
  double eps;         // of the norm
  bool normalize;
  int64_t M, K;
  int8_t* x_i8;      // [M, K]
  float* act_scale;  // [M]
  float* rstd;       // [M] or null, written only when normalize is set
  bool dependent_launch;
};

cudaError_t launch_glu_quantize(const GluQuantizeArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
