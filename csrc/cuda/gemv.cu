// y = x * W^T for one token: every weight is read once. Small layers are bound by latencies (the launch, one
// read, one reduction), large ones by reading the weights. mma.sync m16n8k32, sm_80 and newer.
//
// Weights are operand A, 16 features x 32 columns. A block's warps split K: warp w takes the 16 x 128 blocks
// w, w + kWarps, ... of a row tile, and their sums meet in shared memory. The block walks over every
// gridDim.x-th group of kRowTiles row tiles; while a group is summed up, the reads of the next are under way,
// kDepth items a warp in registers. A small layer has all its reads in flight at once.
//
// One token would use one column of eight of operand B, and every lane would have to collect the eight words
// of x that belong to column 0. Instead the lane that has word i of a block of K (a single coalesced 4-byte
// read) keeps it, in column i / 4, for the one of the eight half-steps it belongs to, and holds zeros for the
// others: then column c of D is the part of the sum that half-step c contributes, and adding the columns up,
// which costs two shuffles, finishes it. No shared memory and no barrier before the product; against staging
// x there this took 2560 x 2560 from 3.2 to 2.6 us.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/gemv.h"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ld_global.cuh"
#include "cuda/ptx/mma.cuh"

namespace bitnet_ext::cuda {
namespace {

// kOnce: a block has one group and a warp at most kDepth items of it, so that nothing is left to loop over.
// Small layers live on that: 13824 x 2560 takes 4.6 us instead of 5.4.
template <typename Weight_, int kRowTiles_, int kDepth_, bool kOnce_>
struct GemvTraits {
  using Weight = Weight_;
  static constexpr bool kOnce = kOnce_;
  static constexpr int kRowTiles = kRowTiles_, kDepth = kDepth_;
  static constexpr int kRows = kRowTiles * kBlockRows;
  static constexpr int kMaxThreads = kRowTiles == 1 && kDepth * Weight::kVectors <= 4 ? 1024 : 640;
};

// x[k .. k + 3] of a row of K, zeros beyond its end.
__device__ __forceinline__ uint32_t load_word(const int8_t* x, int64_t k, int64_t K, bool aligned) {
  if (aligned) return k < K ? *reinterpret_cast<const uint32_t*>(x + k) : 0;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (k + i < K) word |= static_cast<uint32_t>(static_cast<uint8_t>(x[k + i])) << (8 * i);
  }
  return word;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads)
    gemv_kernel(const __grid_constant__ ProductArgs args, bool x_aligned) {
  using Weight = typename Traits::Weight;
  constexpr int kRowTiles = Traits::kRowTiles, kDepth = Traits::kDepth, kRows = Traits::kRows;
  constexpr bool kOnce = Traits::kOnce;
  constexpr int kItem = Weight::kVectors * kLanes;  // vectors of a 16 x 128 block
  extern __shared__ int sums[];                     // [2][warps][kRows]

  const int num_warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_kb = static_cast<int>(block_cols(args.K));
  const int num_tiles = static_cast<int>(block_rows(args.N));
  const int hop = static_cast<int>(gridDim.x) * kRowTiles;
  int tile = static_cast<int>(blockIdx.x) * kRowTiles;

  if (!args.weight_is_constant) wait_for_previous_kernel();
  uint4 weights[kDepth][kRowTiles][Weight::kVectors];
  uint32_t x_words[kDepth];
  const auto fetch_weights = [&](int d, int of_tile, int kb) {
    const uint4* row =
        static_cast<const uint4*>(args.weight) + (static_cast<int64_t>(of_tile) * num_kb + kb) * kItem + lane;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      // A last group that is not full repeats its first row tile.
      const uint4* source = of_tile + r < num_tiles ? row + static_cast<int64_t>(r) * num_kb * kItem : row;
#pragma unroll
      for (int v = 0; v < Weight::kVectors; ++v) weights[d][r][v] = load_once_16(source + v * kLanes);
    }
  };
  const auto fetch_x = [&](int d, int kb) {
    x_words[d] = load_word(args.x_i8, int64_t{kb} * kBlockCols + lane * 4, args.K, x_aligned);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (warp + d * num_warps < num_kb) fetch_weights(d, tile, warp + d * num_warps);
  }
  if (args.weight_is_constant) wait_for_previous_kernel();
  allow_next_kernel();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (warp + d * num_warps < num_kb) fetch_x(d, warp + d * num_warps);
  }

  // What the epilogue needs is asked for before the sums are there.
  const int row = static_cast<int>(threadIdx.x);
  const bool stores = row < kRows;
  const float act_scale = stores && !args.raw ? args.act_scale[0] : 1.0f;
  int buffer = 0;
  for (; tile < num_tiles; tile += hop) {
    const int64_t n = static_cast<int64_t>(tile) * kBlockRows + row;
    ColumnFactors factors{1.0f, 0.0f};
    if (stores && n < args.N) factors = column_factors(args, n);

    int acc[kRowTiles][2][4] = {};  // even and odd steps: two chains of products, half the latency
    for (int first = warp; kOnce || first < num_kb; first += kDepth * num_warps) {
      const bool ends_group = first + kDepth * num_warps >= num_kb;
      const int next_tile = ends_group ? tile + hop : tile;
      const int next_first = ends_group ? warp : first + kDepth * num_warps;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (first + d * num_warps < num_kb) {
          uint32_t b[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) b[i] = lane / 4 == i ? x_words[d] : 0;
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            uint32_t a[4];
            Weight::fragment(weights[d][r], 0, a);
            mma_m16n8k32_s8(acc[r][0], a[0], a[1], a[2], a[3], b[0], b[1]);
            Weight::fragment(weights[d][r], 1, a);
            mma_m16n8k32_s8(acc[r][1], a[0], a[1], a[2], a[3], b[2], b[3]);
            Weight::fragment(weights[d][r], 2, a);
            mma_m16n8k32_s8(acc[r][0], a[0], a[1], a[2], a[3], b[4], b[5]);
            Weight::fragment(weights[d][r], 3, a);
            mma_m16n8k32_s8(acc[r][1], a[0], a[1], a[2], a[3], b[6], b[7]);
          }
        }
        const int next_kb = next_first + d * num_warps;
        if (!kOnce && next_tile < num_tiles && next_kb < num_kb) {
          fetch_weights(d, next_tile, next_kb);
          fetch_x(d, next_kb);
        }
      }
      if constexpr (kOnce) break;
    }

    // Add the eight columns: a lane has two of row g and two of row g + 8; lanes of odd t take over row g
    // + 8.
    int* mine = sums + (buffer * num_warps + warp) * kRows;
    const bool odd = lane % 2 == 1;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int low = acc[r][0][0] + acc[r][0][1] + acc[r][1][0] + acc[r][1][1];
      const int high = acc[r][0][2] + acc[r][0][3] + acc[r][1][2] + acc[r][1][3];
      int sum = (odd ? high : low) + __shfl_xor_sync(kFullWarp, odd ? low : high, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (lane % 4 < 2) mine[r * kBlockRows + lane / 4 + 8 * (lane % 2)] = sum;
    }
    __syncthreads();
    if (stores && n < args.N) {
      const int* all = sums + buffer * num_warps * kRows + row;
      int sum = 0;
#pragma unroll 5
      for (int w = 0; w < num_warps; ++w) sum += all[w * kRows];
      store_output(args, 0, n, sum >> Weight::kShift, act_scale, factors);
    }
    if constexpr (kOnce) break;
    buffer ^= 1;  // the next group's sums go elsewhere, so one barrier a group is enough
  }
}

template <typename Traits>
cudaError_t launch(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream) {
  const int threads = plan.warps * 32;
  if (threads > Traits::kMaxThreads || threads < Traits::kRows) return cudaErrorInvalidConfiguration;
  const bool x_aligned = args.K % 4 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 4 == 0;
  return launch_kernel(gemv_kernel<Traits>,
                       dim3(plan.blocks),
                       dim3(static_cast<unsigned>(threads)),
                       sizeof(int) * 2 * static_cast<size_t>(plan.warps) * Traits::kRows,
                       stream,
                       args.dependent_launch,
                       args,
                       x_aligned);
}

template <typename Weight, int kRowTiles, int kDepth>
cudaError_t launch_once(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream) {
  const bool once = int64_t{plan.blocks} * kRowTiles >= block_rows(args.N) &&
                    int64_t{plan.warps} * kDepth >= block_cols(args.K);
  if (once) return launch<GemvTraits<Weight, kRowTiles, kDepth, true>>(args, plan, stream);
  return launch<GemvTraits<Weight, kRowTiles, kDepth, false>>(args, plan, stream);
}

template <typename Weight, int kRowTiles>
cudaError_t launch_depth(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream) {
  // Vectors in flight a thread: more would not fit the registers.
  constexpr int kMostDepth = 8 / (kRowTiles * Weight::kVectors);
  switch (plan.depth) {
    case 1:
      return launch_once<Weight, kRowTiles, 1>(args, plan, stream);
    case 2:
      if constexpr (kMostDepth >= 2) return launch_once<Weight, kRowTiles, 2>(args, plan, stream);
      return cudaErrorInvalidValue;
    case 4:
      if constexpr (kMostDepth >= 4) return launch_once<Weight, kRowTiles, 4>(args, plan, stream);
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Weight>
cudaError_t launch_rows(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream) {
  if (plan.row_tiles == 1) return launch_depth<Weight, 1>(args, plan, stream);
  if (plan.row_tiles == 2) return launch_depth<Weight, 2>(args, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_gemv(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream) {
  if (args.M != 1) return cudaErrorInvalidValue;
  if (is_ternary(args)) return launch_rows<TernaryWeight>(args, plan, stream);
  return launch_rows<Int8Weight>(args, plan, stream);
}

}  // namespace bitnet_ext::cuda
