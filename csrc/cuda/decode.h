// The product for few tokens (decoding): csrc/cuda/decode.cu.
#pragma once

#include "cuda/plans.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

cudaError_t launch_decode(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
