// Which kernel and which tile computes a product: pure functions of the shape and the number of
// multiprocessors, so that the choice can be tested and tuned without a launch.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

enum class GemmTile { k128x128, k64x64, k32x32 };

// Rows of the weight a warp of the GEMV handles. Four share each activation read from shared memory, one
// gives four times as many warps; four only when the blocks they leave (of 8 warps) still cover the GPU
// twice.
inline int gemv_rows_per_warp(int64_t N, int num_sms) {
  constexpr int kWarps = 8;
  return N >= int64_t{2} * num_sms * kWarps * 4 ? 4 : 1;
}

// The largest tile whose grid still gives every multiprocessor a block. A larger tile reads less; a smaller
// one is faster while the grid is smaller than the GPU, because then only the length of one block counts.
inline GemmTile gemm_tile(int64_t M, int64_t N, int num_sms) {
  const auto tiles = [&](int64_t size) { return ((M + size - 1) / size) * ((N + size - 1) / size); };
  if (tiles(128) >= num_sms) return GemmTile::k128x128;
  if (tiles(64) >= num_sms) return GemmTile::k64x64;
  return GemmTile::k32x32;
}

}  // namespace bitnet_ext::cuda
