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

// Tiles of a single, partly filled round are split along the tokens, where the shares stay long enough. In
// several rounds whole tiles are faster, though the last round leaves clusters idle: clusters at different
// tokens do not share what they read (4096 x 4096 x 16384: 0.50 ms, and 0.56 with split tiles).
constexpr Int8GemmPlan int8_gemm_plan(int64_t rows, int64_t cols, int64_t depth, int num_sms) {
  const int64_t tiles = int8_gemm_tiles(rows, cols), slots = num_sms / 2, stages = (depth + 127) / 128;
  const Int8GemmPlan whole = int8_gemm_whole_plan(rows, cols, num_sms);
  const int64_t room = tiles > 0 ? slots / tiles : 0;
  const int64_t parts = room < stages ? room : stages;  // a cluster has one stage at least
  // An exchange of partial sums takes about 8 us, ten stages.
  if (parts < 2 || stages - stages / parts < 10) return whole;
  return {static_cast<int>(parts * tiles), tiles};
}

constexpr int64_t int8_gemm_partials(const Int8GemmPlan& plan) {
  return int64_t{plan.clusters} * kInt8TileRows * kInt8TileCols;
}

cudaError_t launch_sm90_int8_gemm(const Int8GemmArgs& args, const Int8GemmPlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
