// The product for many tokens on any GPU from sm_80 on: csrc/cuda/sm80_gemm.cu.
#pragma once

#include "cuda/product.h"

namespace bitnet_ext::cuda {

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

// The tile that should take the least time: rounds of blocks over the GPU times the time of a block. A step
// along K costs a block its multiplications and what it reads; per 128 of K an A100 multiplies 128 features
// x 16 tokens in the time in which it reads 8 tokens or 32 features (int8 and 2 bits) from L2. A large tile
// reads less, a small one leaves fewer multiprocessors idle and pads less. The larger of equals.
constexpr GemmTile sm80_gemm_tile(int64_t M, int64_t N, int num_sms) {
  GemmTile best = GemmTile::k128x128;
  int64_t best_cost = INT64_MAX;
  for (const GemmTile tile : kGemmTiles) {
    const int64_t features = tile_features(tile), tokens = tile_tokens(tile);
    const int64_t blocks = (M + tokens - 1) / tokens * ((N + features - 1) / features);
    const int64_t rounds = (blocks + num_sms - 1) / num_sms;
    const int64_t cost = rounds * (features * tokens + 32 * tokens + 8 * features);
    if (cost < best_cost) {
      best = tile;
      best_cost = cost;
    }
  }
  return best;
}

cudaError_t launch_sm80_gemm(const ProductArgs& args, GemmTile tile, int num_sms, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
