// y = x * W^T for few tokens (M <= 16): every weight is read once, and that, or for small layers the latency
// of one read, is the bound. mma.sync m16n8k32, sm_80 and newer.
//
// Weights are operand A, 16 features x 32 columns, so up to 8 tokens cost what one does. A block of kWarps
// warps computes groups of 16 * kRowTiles features and walks over every gridDim.x-th group; its warps split
// K, warp w taking the 16 x 128 blocks w, w + kWarps, ... of a row tile. The sums of the warps meet in shared
// memory once a group.
//
// What keeps the memory busy is a ring of kDepth items a warp in shared memory. A lane copies by cp.async
// exactly the 16 bytes that it will read itself, so the ring needs neither barriers nor registers, and runs
// ahead over the ends of groups: while one group is being summed up, the loads of the next are under way. A
// small layer has all its loads in flight at once.
//
// Tokens are staged in shared memory once a block, rows padded by 16 bytes so that ldmatrix meets no bank
// twice. Columns of B beyond M repeat the last token and are never stored. K beyond the end needs no care:
// the layout holds zero weights there, and whatever x is multiplied with zero.
#include <type_traits>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/decode.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"

namespace bitnet_ext::cuda {
namespace {

template <typename Weight_, int kTokenTiles_, int kRowTiles_, int kDepth_>
struct DecodeTraits {
  using Weight = Weight_;
  static constexpr int kTokenTiles = kTokenTiles_, kRowTiles = kRowTiles_, kDepth = kDepth_;
  static constexpr int kVectors = kRowTiles * Weight::kVectors;  // 16-byte vectors a lane has in an item
  static constexpr int kRows = kRowTiles * kBlockRows;
  static constexpr int kSumStride = kRows + kDecodeSumPadding;
};

// Where a warp is in its sequence of items (group, block of K).
template <typename Traits>
struct WeightCursor {
  const uint4* group;  // this warp's first vector of the group
  const uint4* next;
  int64_t tiles_left;  // row tiles from the group's first to the end; <= 0 beyond the last group
  int kb;

  __device__ __forceinline__
  WeightCursor(const ProductArgs& args, int64_t team, int member, int lane, int num_kb)
      : tiles_left(block_rows(args.N) - team * Traits::kRowTiles), kb(member) {
    const int64_t first = team * Traits::kRowTiles * num_kb + member;
    group = static_cast<const uint4*>(args.weight) + first * Traits::Weight::kVectors * kLanes + lane;
    next = group;
  }

  // Copies the item into this lane's places of a ring slot, `step` vectors apart, and moves on.
  __device__ __forceinline__ void fetch(
      uint4* slot, int step, int num_kb, int member, int splits, int num_teams) {
    constexpr int kItem = Traits::Weight::kVectors * kLanes;
    if (tiles_left > 0) {
#pragma unroll
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        // Row tiles beyond the last repeat it: a full group needs no branches later.
        const int64_t tile = r < tiles_left ? r : tiles_left - 1;
        const uint4* source = next + tile * num_kb * kItem;
#pragma unroll
        for (int v = 0; v < Traits::Weight::kVectors; ++v) {
          cp_async_16(slot + (r * Traits::Weight::kVectors + v) * step, source + v * kLanes, true);
        }
      }
    }
    cp_async_commit();  // an empty group when there is nothing left, so that groups count items
    kb += splits;
    next += splits * kItem;
    if (kb >= num_kb) {
      kb = member;
      group += static_cast<int64_t>(num_teams) * Traits::kRowTiles * num_kb * kItem;
      next = group;
      tiles_left -= static_cast<int64_t>(num_teams) * Traits::kRowTiles;
    }
  }
};

// x [M, K] -> shared memory, by all threads.
__device__ __forceinline__ void stage_tokens(const ProductArgs& args, uint8_t* x_shared, bool x_aligned) {
  const int num_threads = static_cast<int>(blockDim.x);
  const int pieces = static_cast<int>((args.K + 15) / 16);  // of a row
  const int stride = static_cast<int>(decode_row_stride(args.K));
  int m = static_cast<int>(threadIdx.x) / pieces;
  int piece = static_cast<int>(threadIdx.x) % pieces;
  const int tokens = static_cast<int>(args.M);
  constexpr int kBatch = 4;  // loads in flight a thread
  while (m < tokens) {
    uint4 values[kBatch];
    int offsets[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      offsets[i] = m < tokens ? m * stride + piece * 16 : -1;
      if (m < tokens) {
        const int64_t k = static_cast<int64_t>(piece) * 16;
        const int8_t* address = args.x_i8 + m * args.K + k;
        values[i] = x_aligned ? *reinterpret_cast<const uint4*>(address) : load_bytes_16(address, args.K - k);
      }
      piece += num_threads;
      while (piece >= pieces) {
        piece -= pieces;
        ++m;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (offsets[i] >= 0) *reinterpret_cast<uint4*>(x_shared + offsets[i]) = values[i];
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kDecodeMaxWarps * 32)
    decode_kernel(const __grid_constant__ ProductArgs args, int splits, bool x_aligned) {
  using Weight = typename Traits::Weight;
  constexpr int kTokenTiles = Traits::kTokenTiles, kRowTiles = Traits::kRowTiles, kDepth = Traits::kDepth;
  extern __shared__ __align__(128) uint8_t shared[];

  const int num_threads = static_cast<int>(blockDim.x);
  const int num_warps = num_threads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_kb = static_cast<int>(block_cols(args.K));
  const int tokens = static_cast<int>(args.M);
  const int64_t num_groups = (block_rows(args.N) + kRowTiles - 1) / kRowTiles;
  const int team_of_block = warp / splits, member = warp % splits, teams_per_block = num_warps / splits;
  const int num_teams = static_cast<int>(gridDim.x) * teams_per_block;
  const int team = static_cast<int>(blockIdx.x) * teams_per_block + team_of_block;

  uint4* ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;  // [kDepth][kVectors][num_threads]
  uint8_t* x_shared = shared + sizeof(uint4) * kDepth * Traits::kVectors * num_threads;
  int* sums =
      reinterpret_cast<int*>(x_shared + tokens * decode_row_stride(args.K));  // [2][warps][M][kSumStride]
  const int slot_step = Traits::kVectors * num_threads;

  if (!args.weight_is_constant) wait_for_previous_kernel();
  WeightCursor<Traits> cursor(args, team, member, lane, num_kb);
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    cursor.fetch(ring + d * slot_step, num_threads, num_kb, member, splits, num_teams);
  }
  if (args.weight_is_constant) wait_for_previous_kernel();
  stage_tokens(args, x_shared, x_aligned);
  __syncthreads();

  // ldmatrix: lanes 8 i .. 8 i + 7 name the rows (tokens) of matrix i, 16 bytes of K each
  const uint8_t* x_rows[kTokenTiles];
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    const int token = min(tile * 8 + lane % 8, tokens - 1);
    x_rows[tile] = x_shared + token * decode_row_stride(args.K) + lane / 8 * 16;
  }

  int slot = 0;
  int buffer = 0;
  const int team_threads = splits * 32;
  const int first_output = static_cast<int>(threadIdx.x) - team_of_block * team_threads;
  for (int64_t group = team; group < num_groups; group += num_teams) {
    // Not earlier: blocks of the next kernel would take places on some multiprocessors and not on others
    // while this one still streams, and its own share would start late there.
    if (group + num_teams >= num_groups) allow_next_kernel();
    // What the epilogue of this thread needs, asked for now
    const int outputs = tokens * Traits::kRows;
    float act_scale = 1.0f;
    ColumnFactors factors{1.0f, 0.0f};
    {
      const int64_t n = group * Traits::kRows + first_output % Traits::kRows;
      if (first_output < outputs && n < args.N && !args.raw) {
        factors = column_factors(args, n);
        act_scale = args.act_scale[first_output / Traits::kRows];
      }
    }

    int acc[kRowTiles][kTokenTiles][4] = {};
    for (int kb = member; kb < num_kb; kb += splits) {
      cp_async_wait<kDepth - 1>();
      uint4 weights[kRowTiles][Weight::kVectors];
      uint4* place = ring + slot * slot_step;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int v = 0; v < Weight::kVectors; ++v) {
          weights[r][v] = place[(r * Weight::kVectors + v) * num_threads];
        }
      }
      const auto multiply = [&](auto pair) {
        constexpr int kPair = decltype(pair)::value;
        uint32_t b[kTokenTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          ldmatrix_x4(b[tile], x_rows[tile] + kb * kBlockCols + kPair * 64);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          uint32_t a[4];
          Weight::fragment(weights[r], 2 * kPair, a);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            mma_m16n8k32_s8(acc[r][tile], a[0], a[1], a[2], a[3], b[tile][0], b[tile][1]);
          }
          Weight::fragment(weights[r], 2 * kPair + 1, a);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            mma_m16n8k32_s8(acc[r][tile], a[0], a[1], a[2], a[3], b[tile][2], b[tile][3]);
          }
        }
      };
      multiply(std::integral_constant<int, 0>{});
      multiply(std::integral_constant<int, 1>{});
      cursor.fetch(place, num_threads, num_kb, member, splits, num_teams);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }

    // The sums of the team's warps
    int* mine = sums + (buffer * num_warps + warp) * tokens * Traits::kSumStride;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tile * 8 + lane % 4 * 2 + i % 2;
          const int row = r * kBlockRows + lane / 4 + i / 2 * 8;
          if (token < tokens) mine[token * Traits::kSumStride + row] = acc[r][tile][i];
        }
      }
    }
    named_barrier_sync(1 + team_of_block, team_threads);
    const int* all = sums + (buffer * num_warps + team_of_block * splits) * tokens * Traits::kSumStride;
    for (int output = first_output; output < outputs; output += team_threads) {
      const int token = output / Traits::kRows, row = output % Traits::kRows;
      const int64_t n = group * Traits::kRows + row;
      if (n >= args.N) continue;
      int sum = 0;
#pragma unroll 4
      for (int w = 0; w < splits; ++w) sum += all[(w * tokens + token) * Traits::kSumStride + row];
      if (output != first_output && !args.raw) {
        factors = column_factors(args, n);
        act_scale = args.act_scale[token];
      }
      store_output(args, token, n, sum >> Weight::kShift, act_scale, factors);
    }
    buffer ^= 1;  // the next group's sums go elsewhere, so one barrier a group is enough
  }
}

template <typename Traits>
cudaError_t launch(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  const int threads = plan.warps * 32;
  if (plan.warps > kDecodeMaxWarps || plan.splits < 1 || plan.splits > block_cols(args.K) ||
      plan.warps % plan.splits != 0 || plan.warps / plan.splits > kDecodeMaxTeams) {
    return cudaErrorInvalidConfiguration;
  }
  const auto kernel = decode_kernel<Traits>;
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  const bool x_aligned = args.K % 16 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 16 == 0;
  return launch_kernel(kernel,
                       dim3(plan.blocks),
                       dim3(static_cast<unsigned>(threads)),
                       plan.shared_bytes,
                       stream,
                       args.dependent_launch,
                       args,
                       plan.splits,
                       x_aligned);
}

template <typename Weight, int kTokenTiles, int kRowTiles>
cudaError_t launch_depth(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  switch (plan.depth) {
    case 2:
      return launch<DecodeTraits<Weight, kTokenTiles, kRowTiles, 2>>(args, plan, stream);
    case 4:
      return launch<DecodeTraits<Weight, kTokenTiles, kRowTiles, 4>>(args, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Weight, int kTokenTiles>
cudaError_t launch_rows(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  if (plan.row_tiles == 1) return launch_depth<Weight, kTokenTiles, 1>(args, plan, stream);
  if constexpr (Weight::kVectors == 1) {  // int8 weights would need more registers than there are
    if (plan.row_tiles == 2) return launch_depth<Weight, kTokenTiles, 2>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Weight>
cudaError_t launch_tokens(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  if (args.M <= 8) return launch_rows<Weight, 1>(args, plan, stream);
  if (args.M <= 16) return launch_rows<Weight, 2>(args, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_decode(const ProductArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (is_ternary(args)) return launch_tokens<TernaryWeight>(args, plan, stream);
  return launch_tokens<Int8Weight>(args, plan, stream);
}

}  // namespace bitnet_ext::cuda
