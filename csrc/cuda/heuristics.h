// Which kernel computes a product, and how it divides the work: pure functions of the shape and the number of
// multiprocessors, so that the choice can be tested without a GPU. The constants are measured on an H200
// (docs/kernels.md); on other GPUs they are an estimate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/plans.h"

namespace bitnet_ext::cuda {

enum class ProductKernel { kGemv, kDecode, kSm80Gemm, kSm90Gemm };
constexpr const char* kProductKernelNames[] = {"gemv", "decode", "sm80_gemm", "sm90_gemm"};

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// One token. Few warps with one or two 16 x 128 blocks each keep a small layer's chain of latencies short;
// two row tiles a warp halve the blocks of a large one.
inline GemvPlan gemv_plan(int64_t N, int64_t K, WeightKind kind, int num_sms) {
  const int64_t num_kb = block_cols(K), tiles = block_rows(N);
  GemvPlan plan = {};
  if (kind == WeightKind::kInt8) {  // four times the registers a block
    plan.row_tiles = 1;
    plan.depth = 2;
    plan.warps = static_cast<int>(std::min<int64_t>(16, divide_up(num_kb, 2)));
  } else {
    plan.row_tiles = tiles >= 4 * num_sms ? 2 : 1;
    plan.depth = num_kb <= (plan.row_tiles == 2 ? 26 : 40) ? 2 : 4;
    const int limit = plan.row_tiles == 1 ? 32 : 20;
    plan.warps = static_cast<int>(std::min<int64_t>(limit, divide_up(num_kb, plan.depth)));
  }
  plan.warps = std::max(plan.warps, plan.row_tiles == 2 ? 2 : 1);
  plan.blocks = static_cast<uint32_t>(divide_up(tiles, plan.row_tiles));
  return plan;
}

// 2 .. 16 tokens, or one with a large weight: teams for as many groups as there are, because fewer warps a
// team mean fewer partial sums, in one block a multiprocessor or, where x is small, in two, whose barriers
// and ends do not coincide. x and the ring share a multiprocessor's memory: blocks == 0 says that they do not
// fit.
inline DecodePlan decode_plan(
    int64_t M, int64_t N, int64_t K, WeightKind kind, int num_sms, size_t shared_limit) {
  const int64_t num_kb = block_cols(K), tiles = block_rows(N);
  const bool ternary = kind == WeightKind::kTernary;
  // Two row tiles a warp share each read of the tokens. That needs many of them.
  const bool pair_tiles = ternary && (M > 8 || M <= 4 || tiles >= 10 * num_sms) && tiles >= 5 * num_sms;
  for (const int row_tiles : {2, 1}) {
    if (row_tiles == 2 && !pair_tiles) continue;
    const int64_t groups = divide_up(tiles, row_tiles);
    for (const int64_t per_sm : {2, 1}) {
      if (per_sm == 2 && !(row_tiles == 2 && M <= 4)) continue;
      const int64_t slots = per_sm * num_sms;
      const int64_t most_teams = std::min<int64_t>(kDecodeMaxTeams / per_sm, divide_up(groups, slots));
      // Groups of the busiest block, which decides; as many teams as stay near the fewest.
      const auto busiest = [&](int64_t teams) { return divide_up(groups, teams * slots) * teams; };
      int64_t fewest = busiest(1);
      for (int64_t teams = 2; teams <= most_teams; ++teams) fewest = std::min(fewest, busiest(teams));
      for (int64_t teams = most_teams; teams >= per_sm; --teams) {
        if (busiest(teams) * 5 > fewest * 6 && teams > 1) continue;
        for (const int depth : {4, 2}) {
          DecodePlan plan = {};
          // As many warps a team as the registers leave, without a last pass over K for some of them only.
          const int64_t passes = divide_up(num_kb, kDecodeMaxWarps / per_sm / teams);
          if (depth == 4 && ternary && (passes < 4 || (row_tiles == 2 && M > 8))) continue;
          plan.splits = static_cast<int>(divide_up(num_kb, passes));
          // One warp less where all of them then have equally much to do (14336 x 4096, M = 16: 9.2 us,
          // not 9.6)
          const bool even = num_kb % plan.splits == 0 || plan.splits <= 3 || num_kb % (plan.splits - 1) != 0;
          if (!even) --plan.splits;
          plan.warps = static_cast<int>(teams) * plan.splits;
          plan.row_tiles = row_tiles;
          plan.depth = depth;
          const int64_t blocks = std::min(slots, divide_up(groups, teams));
          plan.blocks = static_cast<uint32_t>(blocks);
          plan.shared_bytes =
              decode_shared_bytes(kind, M, K, plan.warps, row_tiles, depth, blocks * teams < groups);
          constexpr size_t kReserved = 1024;  // of the system, for each block
          if (plan.shared_bytes * static_cast<size_t>(per_sm) <= shared_limit - kReserved) return plan;
        }
      }
    }
  }
  return DecodePlan{};
}

// Many tokens by mma.sync: the tile that should take the least time, rounds of blocks over the GPU times the
// time of a block. A step along K costs a block its multiplications and what it reads; per 128 of K an A100
// multiplies 128 features x 16 tokens in the time in which it reads 8 tokens or 32 features (int8 and 2 bits)
// from L2. A large tile reads less, a small one leaves fewer multiprocessors idle and pads less. The larger
// of equals.
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

// Many tokens on Hopper: the tile that should take the least time. A block's time is, for each tile, its
// stages (256 columns of K) and its end, and, where tiles are split over blocks, the exchange of partial
// sums.
inline Sm90Plan sm90_plan(int64_t M, int64_t N, int64_t K, WeightKind kind, int num_sms) {
  struct Candidate {
    int features, tokens;
    double stage_us, end_us;      // with every multiprocessor busy
    double exchange_us, part_us;  // of a split, and of each block that takes part in it
  };
  constexpr Candidate kCandidates[] = {{256, 128, 1.135, 3.2, 2.4, 1.5},
                                       {128, 192, 0.86, 2.1, 1.7, 1.5},
                                       {128, 128, 0.58, 1.4, 2.0, 0.65},
                                       {256, 64, 0.60, 2.0, 2.0, 0.9},
                                       {128, 64, 0.356, 1.45, 1.2, 0.6},
                                       {128, 32, 0.33, 0.9, 0.9, 0.65},
                                       {128, 16, 0.30, 0.9, 0.9, 0.65}};
  const int64_t stages = divide_up(K, 256);
  Sm90Plan best = {};
  for (const Candidate& c : kCandidates) {
    if (kind == WeightKind::kInt8 && c.features * c.tokens > 128 * 128) continue;
    if (c.tokens > 16 && c.tokens >= 2 * M) continue;
    const int64_t tiles = divide_up(N, c.features) * divide_up(M, c.tokens);
    const int64_t slots = int64_t{num_sms} * sm90_blocks_per_sm(c.tokens);
    const auto consider = [&](int64_t blocks, int64_t split_tiles, double tiles_a_block, double parts) {
      // Two narrow blocks on one multiprocessor slow each other down.
      double us = tiles_a_block * static_cast<double>(stages) * c.stage_us * (blocks > num_sms ? 1.5 : 1.0) +
                  std::ceil(tiles_a_block) * c.end_us;
      if (split_tiles > 0) us += c.exchange_us + parts * c.part_us;
      // The first of near equals: large tiles read less and so leave more of the power limit to the products
      // (16384 x 14336 x 4096 by itself: 1,563 TOP/s with 256 x 128, 1,532 with 128 x 128).
      if (best.blocks != 0 && us >= 0.97 * best.us) return;
      best = {c.features, c.tokens, static_cast<uint32_t>(blocks), split_tiles, us};
    };
    const int64_t rounds = divide_up(tiles, slots);
    consider(divide_up(tiles, rounds), 0, static_cast<double>(rounds), 0.0);
    if (rounds > 1) {
      // The tiles of the last, partly filled round and of the round before it, in shares of more than a tile.
      if (tiles % slots == 0) continue;
      constexpr double kParts = 5.0;  // as if, for the cuts fall anywhere
      consider(slots, tiles % slots + slots, static_cast<double>(tiles) / static_cast<double>(slots), kParts);
      continue;
    }
    // Less than a round: each tile in equal parts, which end at the same time.
    for (int64_t parts = 2; parts * tiles <= num_sms && 2 * parts <= stages; ++parts) {
      consider(parts * tiles,
               tiles,
               static_cast<double>(divide_up(stages, parts)) / static_cast<double>(stages),
               static_cast<double>(parts));
    }
  }
  return best;
}

// Whether the mma.sync GEMM is the better one on Hopper: for few tokens and a grid of one round its blocks,
// which split K over their warps, are done sooner. wgmma takes as long for 16 tokens as for 128 when the
// weights come from registers.
inline bool prefers_sm80_gemm(int64_t M, int64_t N, int64_t K, WeightKind kind, int num_sms) {
  if (M > 128) return false;
  const GemmTile tile = sm80_gemm_tile(M, N, num_sms);
  const int64_t area = int64_t{tile_features(tile)} * tile_tokens(tile);
  if (area > 64 * 64) return false;
  if (divide_up(N, tile_features(tile)) * divide_up(M, tile_tokens(tile)) > num_sms) return false;
  const double us_of_512 = area <= 32 * 32 ? 0.55 : area <= 64 * 32 ? 0.76 : 1.25;
  return us_of_512 * static_cast<double>(K) / 512.0 < sm90_plan(M, N, K, kind, num_sms).us;
}

// The kernel for a product. `sm90`: the device and this build have wgmma, and the copy engine can read x.
inline ProductKernel product_kernel(
    int64_t M, int64_t N, int64_t K, WeightKind kind, bool sm90, int num_sms, size_t shared_limit) {
  const int64_t block_bytes = kind == WeightKind::kTernary ? kTernaryBlockBytes : kInt8BlockBytes;
  // Beyond this a weight is read for longer than its latencies take, and the deeper queue of the decode
  // kernel wins.
  constexpr int64_t kLargeWeight = int64_t{12} << 20;
  if (M == 1 && block_rows(N) * block_cols(K) * block_bytes < kLargeWeight) return ProductKernel::kGemv;
  if (M <= kDecodeMaxTokens) {
    if (decode_plan(M, N, K, kind, num_sms, shared_limit).blocks != 0) return ProductKernel::kDecode;
    if (M == 1) return ProductKernel::kGemv;
  }
  if (!sm90 || prefers_sm80_gemm(M, N, K, kind, num_sms)) return ProductKernel::kSm80Gemm;
  return ProductKernel::kSm90Gemm;
}

}  // namespace bitnet_ext::cuda
