// Backward of the gated product of a feed-forward block and of the RMS norm behind it.
#pragma once

#include <cuda_runtime.h>

#include "cuda/glu_quantize.h"
#include "cuda/norm_backward.h"

namespace bitnet_ext::cuda {

struct GluBackwardArgs {
  NormBackwardArgs norm;         // of y = norm(h)
  TypedRows gate, up;            // [M, K] of one type
  TypedRows grad_gate, grad_up;  // [M, K] of that type
  GluActivation activation;
};

cudaError_t launch_glu_backward(const GluBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
