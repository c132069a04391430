// The product for many tokens on Hopper: csrc/cuda/sm90_gemm.cu.
#pragma once

#include "cuda/plans.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

constexpr int64_t sm90_tiles(const ProductArgs& args, const Sm90Plan& plan) {
  return (args.N + plan.features - 1) / plan.features * ((args.M + plan.tokens - 1) / plan.tokens);
}

// int32 elements of ProductArgs::partials for a plan with split tiles.
constexpr int64_t sm90_partials(const Sm90Plan& plan) {
  return int64_t{plan.blocks} * plan.features * plan.tokens;
}
// Whether the copy engine can read x: rows of a multiple of 16 bytes at an address that is one.
inline bool sm90_can_read(const ProductArgs& args) {
  return args.K % 16 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 16 == 0;
}

// False when this build has no code for compute capability 9.0 (sm_90a).
bool sm90_is_compiled();

cudaError_t launch_sm90_gemm(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
