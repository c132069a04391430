// The product for few tokens (decoding): csrc/cuda/decode.cu.
#pragma once

#include "cuda/product.h"

namespace bitnet_ext::cuda {

constexpr int kDecodeMaxTokens = 16;
constexpr int kDecodeMaxWarps = 20;  // more would leave a thread fewer registers than it needs

constexpr int kDecodeMaxTeams = 5;

// How a decode launch divides the work; chosen by decode_plan (heuristics.h).
struct DecodePlan {
  int warps;        // of a block: 1 .. kDecodeMaxWarps, a multiple of splits
  int splits;       // warps of a team, over which K is split; a block has at most kDecodeMaxTeams teams
  int row_tiles;    // of 16 features that a warp works on at a time: 1 or 2
  int depth;        // 16 x 128 blocks (times row_tiles) a warp has in flight: 2 or 4
  uint32_t blocks;  // teams walk over every (number of teams)-th group of row_tiles
  size_t shared_bytes;
};

// Shared memory of a launch: x, the ring of weights and the partial sums.
size_t decode_shared_bytes(
    WeightKind kind, int64_t M, int64_t K, int warps, int row_tiles, int depth, bool walks);

cudaError_t launch_decode(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
