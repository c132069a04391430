// Maps a one-dimensional grid onto a matrix of `rows` x `units`, where a unit is what one thread handles.
// One dimension, because gridDim.y stops at 65,535; 32-bit division, because a 64-bit one (about 70
// instructions) would cost more than the 4 to 16 bytes a thread moves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

struct RowTiling {
  static constexpr int kThreads = 256;

  int64_t rows;
  int64_t units;        // per row
  int log2_width;       // threads of a block along a row
  uint32_t tiles_wide;  // tiles along a row
  uint32_t num_tiles;   // 0 when the matrix is too large for one grid

  __device__ __forceinline__ int64_t row(uint32_t tile) const {
    return static_cast<int64_t>(tile / tiles_wide) * (kThreads >> log2_width) + (threadIdx.x >> log2_width);
  }
  __device__ __forceinline__ int64_t unit(uint32_t tile) const {
    return (static_cast<int64_t>(tile % tiles_wide) << log2_width) + (threadIdx.x & ((1u << log2_width) - 1));
  }
};

// The width that leaves the fewest threads idle at the end of a row; the widest of equals.
inline RowTiling make_row_tiling(int64_t rows, int64_t units) {
  int best = 8;
  int64_t best_cost = INT64_MAX;
  for (int log2_width = 8; log2_width >= 0; --log2_width) {
    const int64_t width = int64_t{1} << log2_width;
    const int64_t cost = (units + width - 1) / width * width;
    // Below a warp a row's accesses no longer coalesce, so narrow tiles are for narrow rows only.
    if (log2_width < 5 && width < units) break;
    if (cost < best_cost) {
      best = log2_width;
      best_cost = cost;
    }
  }
  const int64_t width = int64_t{1} << best;
  const int64_t tiles_wide = (units + width - 1) / width;
  const int64_t rows_per_tile = RowTiling::kThreads >> best;
  const int64_t num_tiles = (rows + rows_per_tile - 1) / rows_per_tile * tiles_wide;
  const bool fits = num_tiles <= INT32_MAX;
  return {rows,
          units,
          best,
          static_cast<uint32_t>(fits ? tiles_wide : 1),
          static_cast<uint32_t>(fits ? num_tiles : 0)};
}

}  // namespace bitnet_ext::cuda
