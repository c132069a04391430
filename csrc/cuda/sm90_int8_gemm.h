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

constexpr int64_t int8_gemm_tiles(int64_t rows, int64_t cols) {
  return (rows + kInt8TileRows - 1) / kInt8TileRows * ((cols + kInt8TileCols - 1) / kInt8TileCols);
}

// Every tile by one cluster, as few clusters as keep the number of rounds.
constexpr Int8GemmPlan int8_gemm_whole_plan(int64_t rows, int64_t cols, int num_sms) {
  const int64_t tiles = int8_gemm_tiles(rows, cols), slots = num_sms / 2;
  const int64_t rounds = (tiles + slots - 1) / slots;
  return {static_cast<int>((tiles + rounds - 1) / rounds), 0};
}

// Whole tiles, or the last two rounds split: whichever should take less time. A stage of a tile takes a
// cluster about 0.8 us, an exchange of partial sums about 8 us.
constexpr Int8GemmPlan int8_gemm_plan(int64_t rows, int64_t cols, int64_t depth, int num_sms) {
  const int64_t tiles = int8_gemm_tiles(rows, cols), slots = num_sms / 2, stages = (depth + 127) / 128;
  const int64_t rounds = (tiles + slots - 1) / slots;
  const double idle_rounds =
      static_cast<double>(rounds) - static_cast<double>(tiles) / static_cast<double>(slots);
  const Int8GemmPlan whole = int8_gemm_whole_plan(rows, cols, num_sms);
  if (0.8 * static_cast<double>(stages) * idle_rounds < 8.0) return whole;
  if (rounds > 1) return {static_cast<int>(slots), tiles % slots + slots};
  const int64_t most = tiles * stages / 4;  // no share of fewer than four stages
  const int64_t clusters = most < slots ? most : slots;
  return clusters > tiles ? Int8GemmPlan{static_cast<int>(clusters), tiles} : whole;
}

constexpr int64_t int8_gemm_partials(const Int8GemmPlan& plan) {
  return int64_t{plan.clusters} * kInt8TileRows * kInt8TileCols;
}

cudaError_t launch_sm90_int8_gemm(const Int8GemmArgs& args, const Int8GemmPlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
