// How the launches of the product kernels divide their work. No CUDA here: heuristics.h makes these from a
// shape, on any machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "prepacked.h"

namespace bitnet_ext::cuda {

// --- gemv.cu --------------------------------------------------------------------------------------------

struct GemvPlan {
  int warps;        // of a block, over which K is split: 1 .. 20, or 32 with few registers
  int row_tiles;    // of 16 features that a warp works on at a time: 1 or 2
  int depth;        // blocks of 16 x 128 (times row_tiles) a warp has in flight: 1, 2 or 4
  uint32_t blocks;  // each walks over every blocks-th group of row_tiles
};

// --- decode.cu ------------------------------------------------------------------------------------------

constexpr int kDecodeMaxTokens = 16;
constexpr int kDecodeMaxWarps = 20;  // more would leave a thread fewer registers than it needs
constexpr int kDecodeMaxTeams = 5;

struct DecodePlan {
  int warps;        // of a block: 1 .. kDecodeMaxWarps, a multiple of splits
  int splits;       // warps of a team, over which K is split; a block has at most kDecodeMaxTeams teams
  int row_tiles;    // of 16 features that a warp works on at a time: 1 or 2
  int depth;        // 16 x 128 blocks (times row_tiles) a warp has in flight: 2 or 4
  uint32_t blocks;  // teams walk over every (number of teams)-th group of row_tiles
  size_t shared_bytes;
};

// Between the rows of x in shared memory, in bytes, and between the tokens of the partial sums, in ints, so
// that ldmatrix and the stores of the sums meet no bank twice.
constexpr int kDecodePadding = 16;
constexpr int kDecodeSumPadding = 4;

constexpr int64_t decode_row_stride(int64_t K) {
  return block_cols(K) * kBlockCols + kDecodePadding;
}

// Shared memory of a launch: the ring of weights, x and the partial sums, two sets of which when a team has
// more than one group (`walks`).
constexpr size_t decode_shared_bytes(
    WeightKind kind, int64_t M, int64_t K, int warps, int row_tiles, int depth, bool walks) {
  const int64_t item = row_tiles * (kind == WeightKind::kTernary ? kTernaryBlockBytes : kInt8BlockBytes);
  const int64_t sums =
      int64_t{4} * (walks ? 2 : 1) * warps * M * (row_tiles * kBlockRows + kDecodeSumPadding);
  return static_cast<size_t>(item * depth * warps + M * decode_row_stride(K) + sums);
}

// --- sm80_gemm.cu ---------------------------------------------------------------------------------------

// What a block computes: features x tokens.
enum class GemmTile { k128x128, k128x64, k64x64, k64x32, k32x32 };

constexpr GemmTile kGemmTiles[] = {
    GemmTile::k128x128, GemmTile::k128x64, GemmTile::k64x64, GemmTile::k64x32, GemmTile::k32x32};

constexpr int tile_features(GemmTile tile) {
  return tile == GemmTile::k128x128 || tile == GemmTile::k128x64 ? 128 : tile == GemmTile::k32x32 ? 32 : 64;
}
constexpr int tile_tokens(GemmTile tile) {
  return tile == GemmTile::k128x128 ? 128 : tile == GemmTile::k64x32 || tile == GemmTile::k32x32 ? 32 : 64;
}

// --- sm90_gemm.cu ---------------------------------------------------------------------------------------

struct Sm90Plan {
  int features;         // of a tile: 128, or 256 with tokens >= 64
  int tokens;           // of a tile: 16, 32, 64, 128 or 192; 192 for 128 features of ternary weights
  uint32_t blocks;      // at most sm90_blocks_per_sm a multiprocessor: all of them run at the same time
  int64_t split_tiles;  // the first tiles, whose K is divided evenly over the blocks; the others stay whole
  double us;            // estimated time of the work itself, without the start
};

constexpr int sm90_blocks_per_sm(int tokens) {
  return tokens <= 32 ? 2 : 1;
}

}  // namespace bitnet_ext::cuda
