// The product for many tokens on Hopper: csrc/cuda/sm90_gemm.cu.
#pragma once

#include "cuda/product.h"

namespace bitnet_ext::cuda {

// How a launch divides the work; chosen by sm90_plan (heuristics.h).
struct Sm90Plan {
  int features;         // of a tile: 128, or 256 with tokens >= 64
  int tokens;           // of a tile: 16, 32, 64 or 128
  uint32_t blocks;      // at most sm90_blocks_per_sm a multiprocessor: all of them run at the same time
  int64_t split_tiles;  // the first tiles, whose K is divided evenly over the blocks; the others stay whole
  double us;            // estimated time of the work itself, without the start
};

constexpr int sm90_blocks_per_sm(int tokens) {
  return tokens <= 32 ? 2 : 1;
}

constexpr int64_t sm90_tiles(const ProductArgs& args, const Sm90Plan& plan) {
  return (args.N + plan.features - 1) / plan.features * ((args.M + plan.tokens - 1) / plan.tokens);
}

// int32 elements of ProductArgs::partials, and elements of flags, for a plan with split tiles.
constexpr int64_t sm90_partials(const Sm90Plan& plan) {
  return int64_t{plan.blocks} * plan.features * plan.tokens;
}
constexpr int64_t sm90_flags(const Sm90Plan& plan) {
  return int64_t{plan.blocks} * 2;
}

// Whether the copy engine can read x: rows of a multiple of 16 bytes at an address that is one.
inline bool sm90_can_read(const ProductArgs& args) {
  return args.K % 16 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 16 == 0;
}

// False when this build has no code for compute capability 9.0 (sm_90a).
bool sm90_is_compiled();

cudaError_t launch_sm90_gemm(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
