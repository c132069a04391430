// The product for many tokens on any GPU from sm_80 on: csrc/cuda/sm80_gemm.cu.
#pragma once

#include "cuda/plans.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

cudaError_t launch_sm80_gemm(const ProductArgs& args, GemmTile tile, int num_sms, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
