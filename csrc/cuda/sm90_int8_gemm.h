// The product of two int8 matrices over tokens, for weight gradients: csrc/cuda/sm90_int8_gemm.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct Int8GemmArgs {
  const int8_t* a;  // [rows, depth], 16-byte aligned
  const int8_t* b;  // [cols, depth], 16-byte aligned
  int64_t rows, cols;
  int64_t depth;             // tokens, a multiple of kStageTokens
  const float* column_max;   // [rows] of a, see int8_gradient.h
  const float* stage_bound;  // [depth / kStageTokens]
  void* out;                 // [rows, cols] of out_dtype
  DType out_dtype;
  bool dependent_launch;
  int32_t* partials;  // [int8_gemm_partials(plan)] when tiles are split, else null
  uint32_t* flags;    // four for each cluster, zero before and after the launch; else null
};

// A tile of a cluster of two blocks is 256 x 256.
constexpr int kInt8TileRows = 256, kInt8TileCols = 256;

struct Int8GemmPlan {
  int clusters;
  int64_t split_tiles;  // the first tiles, whose depth is divided evenly over the clusters
};

// Whole tiles in rounds, or the last two rounds split: whichever should take less time. A stage of a tile
// takes a cluster about 0.8 us, an exchange of partial sums about 8 us.
constexpr Int8GemmPlan int8_gemm_plan(int64_t rows, int64_t cols, int64_t depth, int num_sms) {
  const int64_t tiles = (rows + kInt8TileRows - 1) / kInt8TileRows * ((cols + kInt8TileCols - 1) / kInt8TileCols);
  const int64_t stages = (depth + 127) / 128, slots = num_sms / 2;
  const int64_t rounds = (tiles + slots - 1) / slots;
  const int64_t even = (tiles + rounds - 1) / rounds;  // clusters that whole tiles keep busy
  if (tiles % slots == 0) return {static_cast<int>(slots), 0};
  const double idle_us = 0.8 * static_cast<double>(stages) *
                         (static_cast<double>(rounds) - static_cast<double>(tiles) / static_cast<double>(slots));
  if (idle_us < 8.0) return {static_cast<int>(even), 0};
  const int64_t split = rounds > 1 ? tiles % slots + slots : tiles;
  const int64_t most = split * stages / 4;  // no share of fewer than four stages
  const int64_t clusters = rounds > 1 || most >= slots ? slots : most;
  if (clusters <= tiles) return rounds > 1 ? Int8GemmPlan{static_cast<int>(slots), split}
                                           : Int8GemmPlan{static_cast<int>(even), 0};
  return {static_cast<int>(clusters), split};
}

constexpr int64_t int8_gemm_partials(const Int8GemmPlan& plan) {
  return int64_t{plan.clusters} * kInt8TileRows * kInt8TileCols;
}

cudaError_t launch_sm90_int8_gemm(const Int8GemmArgs& args, const Int8GemmPlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
