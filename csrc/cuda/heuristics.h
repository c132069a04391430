// Which kernel computes a product, and how it divides the work: pure functions of the shape and the number of
// multiprocessors, so that the choice can be tested without a GPU. The constants are measured on an H200
// (docs/kernels.md); on other GPUs they are an estimate.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/decode.h"
#include "cuda/gemv.h"
#include "cuda/sm80_gemm.h"
#include "cuda/sm90_gemm.h"

namespace bitnet_ext::cuda {

enum class ProductKernel { kGemv, kDecode, kSm80Gemm, kSm90Gemm };

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

// 2 .. 16 tokens, or one with a large weight. x and the ring share a multiprocessor's memory: blocks == 0
// says that they do not fit.
inline DecodePlan decode_plan(
    int64_t M, int64_t N, int64_t K, WeightKind kind, int num_sms, size_t shared_limit) {
  const int64_t num_kb = block_cols(K), tiles = block_rows(N);
  const bool ternary = kind == WeightKind::kTernary;
  for (const int row_tiles : {2, 1}) {
    for (const int most_warps : {20, 16, 10, 8, 4}) {
      DecodePlan plan = {};
      plan.row_tiles = ternary ? row_tiles : 1;
      const int64_t groups = divide_up(tiles, plan.row_tiles);
      // Many groups: small blocks, so that two or more share a multiprocessor and hide each other's
      // reductions.
      const int64_t wanted = groups > 2 * num_sms ? std::min<int64_t>(most_warps, 10) : most_warps;
      const int64_t passes = divide_up(num_kb, wanted);
      plan.warps = static_cast<int>(std::max<int64_t>(divide_up(num_kb, passes), plan.row_tiles));
      plan.depth = ternary && passes > 2 ? 4 : 2;
      const int64_t per_sm = std::max<int64_t>(1, 24 / plan.warps);
      const int64_t blocks = std::min(groups, num_sms * per_sm);
      plan.blocks = static_cast<uint32_t>(blocks);
      plan.shared_bytes =
          decode_shared_bytes(kind, M, K, plan.warps, plan.row_tiles, plan.depth, blocks < groups);
      if (plan.shared_bytes <= shared_limit / static_cast<size_t>(groups > num_sms ? per_sm : 1)) return plan;
      if (plan.shared_bytes <= shared_limit) {
        plan.blocks = static_cast<uint32_t>(std::min<int64_t>(groups, num_sms));
        plan.shared_bytes =
            decode_shared_bytes(kind, M, K, plan.warps, plan.row_tiles, plan.depth, plan.blocks < groups);
        if (plan.shared_bytes <= shared_limit) return plan;
      }
    }
  }
  return DecodePlan{};
}

// Many tokens on Hopper: the tile that should take the least time. A block's time is a start, its stages (256
// columns of K) and, where tiles are split over blocks, the exchange of partial sums.
inline Sm90Plan sm90_plan(int64_t M, int64_t N, int64_t K, WeightKind kind, int num_sms) {
  struct Candidate {
    int features, tokens;
    double stage_us;  // with every multiprocessor busy
    double split_us;  // of collecting partial tiles
  };
  constexpr Candidate kCandidates[] = {{256, 128, 1.38, 9.0},
                                       {128, 128, 0.70, 5.0},
                                       {256, 64, 0.84, 5.5},
                                       {128, 64, 0.51, 4.0},
                                       {128, 32, 0.42, 3.0},
                                       {128, 16, 0.36, 2.5}};
  const int64_t stages = divide_up(K, 256);
  Sm90Plan best = {};
  double best_us = 0.0;
  for (const Candidate& c : kCandidates) {
    if (kind == WeightKind::kInt8 && c.features * c.tokens > 128 * 128) continue;
    if (c.tokens > 16 && c.tokens >= 2 * M) continue;
    const int64_t tiles = divide_up(N, c.features) * divide_up(M, c.tokens);
    const int64_t per_sm = sm90_blocks_per_sm(c.tokens);
    const auto consider = [&](int64_t blocks, int64_t split_tiles, double us) {
      if (best.blocks != 0 && us >= best_us) return;
      best = {c.features, c.tokens, static_cast<uint32_t>(blocks), split_tiles};
      best_us = us;
    };
    // Two narrow blocks on one multiprocessor slow each other down by about half.
    const auto stage_us = [&](int64_t blocks) { return c.stage_us * (blocks > num_sms ? 1.5 : 1.0); };
    const int64_t slots = num_sms * per_sm;
    const int64_t blocks = std::min(tiles, slots);
    const int64_t rounds = divide_up(tiles, blocks);
    consider(blocks, 0, static_cast<double>(rounds * stages) * stage_us(blocks));
    if (tiles % slots == 0) continue;
    // The tiles of the last, partly filled round are split, and those of the round before it where there is
    // one, so that every share is at least a tile long.
    const int64_t split = tiles > slots ? tiles % slots + slots : tiles;
    for (const int64_t shares : {slots, int64_t{num_sms}}) {
      if (split * stages < 2 * shares || (tiles > slots && shares != slots)) continue;
      const double whole = static_cast<double>((tiles - split) / shares * stages);
      const double shared = static_cast<double>(split * stages) / static_cast<double>(shares);
      consider(shares, split, (whole + shared) * stage_us(shares) + c.split_us);
    }
  }
  return best;
}

// The kernel for a product. `sm90`: the device and this build have wgmma, and the copy engine can read x.
inline ProductKernel product_kernel(
    int64_t M, int64_t N, int64_t K, WeightKind kind, bool sm90, int num_sms, size_t shared_limit) {
  const int64_t block_bytes = kind == WeightKind::kTernary ? kTernaryBlockBytes : kInt8BlockBytes;
  // Beyond this a weight is read for longer than its latencies take, and the deeper queue of the decode
  // kernel wins.
  constexpr int64_t kLargeWeight = int64_t{24} << 20;
  if (M == 1 && block_rows(N) * block_cols(K) * block_bytes < kLargeWeight) return ProductKernel::kGemv;
  if (M <= 16) {
    const bool fits = decode_plan(M, N, K, kind, num_sms, shared_limit).blocks != 0;
    // From 9 tokens on, two products a weight fragment: wgmma, when its tiles come close to one round.
    const bool wide = M > 8 && divide_up(N, 128) * 4 >= num_sms * 3;
    if (fits && !(sm90 && wide)) return ProductKernel::kDecode;
    if (M == 1) return ProductKernel::kGemv;
  }
  return sm90 ? ProductKernel::kSm90Gemm : ProductKernel::kSm80Gemm;
}

}  // namespace bitnet_ext::cuda
