// The product for one token: csrc/cuda/gemv.cu.
#pragma once

#include "cuda/plans.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

cudaError_t launch_gemv(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
