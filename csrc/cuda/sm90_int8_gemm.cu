// The weight gradient from int8 operands on Hopper's tensor cores: a product over tokens, both operands in
// shared memory.
//
//   out[r, c] = unit(r) * sum_m a[r, m] * b[c, m]        int8 [rows, depth], int8 [cols, depth], tokens
//   contiguous
//
// The unit of a row may fall along the tokens, by stages of 128 (int8_gradient.h). Where it does, the int32
// sums so far are multiplied by the ratio of the two units and rounded, in place: a second set of
// accumulators, as promotion to fp32 takes, would halve the tile. Between two falls the sums are exact; the
// maker of the units sees to it that none leaves int32.
//
// A cluster of two blocks computes 256 x 256, each block 128 rows of it with two consumer warpgroups of
// 64 x 256. A block loads its own rows of a, and half of the columns' b, which the copy engine writes to both
// blocks: a cluster reads 512 bytes from L2 for 65,536 products, half of what 128 x 128 tiles of single
// blocks read, which L2 could not deliver at the speed of the tensor cores. The ring of 4 stages of 48 KiB is
// filled by one thread a block. A stage is free when the consumers of both blocks are done with it.
//
// The grid is persistent, one cluster for each two multiprocessors; tiles of the last rounds are split along
// the tokens over clusters (common/work_split.cuh).
//
// Bound: tensor cores, by power and L2 together.
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/int8_gradient.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/wgmma_shared.cuh"
#include "cuda/sm90_int8_gemm.h"
#include "cuda/sm90_tile.cuh"

// Architectures older than 9.0 know no clusters, and leave the kernel's body out and what it uses unused.
#pragma nv_diag_suppress 177
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BITNET_EXT_PAIR_OF_BLOCKS __cluster_dims__(1, 2, 1)
#else
#define BITNET_EXT_PAIR_OF_BLOCKS
#endif

namespace bitnet_ext::cuda {
namespace {

struct Int8GemmTraits {
  static constexpr int kRowBlocks = 1, kAcc = 128;  // of a warpgroup: 64 x 256
  static constexpr int kBlockRowsOfA = kInt8TileRows / 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kBytesA = kBlockRowsOfA * kStageTokens;
  static constexpr int kBytesHalfB = kInt8TileCols / 2 * kStageTokens;
  static constexpr int kStageBytes = kBytesA + 2 * kBytesHalfB;
  static constexpr int kStages = 4;
  static constexpr int kBytesOut = 64 * 128;  // a warpgroup's 64 rows x 64 columns in 16 bits
  static constexpr int kOutBuffers = 2;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kConsumers * kOutBuffers * kBytesOut + 2 * kStages * 8;
  static_assert(kSharedBytes <= kMaxShared, "the ring fits shared memory");
};

constexpr int kGemmProducerRegisters = 40, kGemmConsumerRegisters = 232;

struct Int8GemmParams {
  Int8GemmArgs args;
  WorkSplit work;  // of clusters
  int row_tiles, col_tiles;
  bool rows_fastest;  // the smaller operand stays in L2 while the other streams
  bool store_by_copy_engine;

  __device__ __forceinline__ void origin(int tile, int& row, int& col) const {
    row = (rows_fastest ? tile % row_tiles : tile / col_tiles) * kInt8TileRows;
    col = (rows_fastest ? tile / row_tiles : tile % col_tiles) * kInt8TileCols;
  }
};

// The two rows of a thread, 8 apart; their columns' bounds.
struct RowPair {
  float max[2];

  __device__ __forceinline__ RowPair(const Int8GemmArgs& args, int64_t row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) max[i] = row + 8 * i < args.rows ? args.column_max[row + 8 * i] : 0.0f;
  }
};

// From units under bound `from` to units under `to`. A column of zeros has 0 / 0, and NaN becomes 0.
__device__ __forceinline__ void change_units(int (&acc)[128], const RowPair& rows, float from, float to) {
  float ratio[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) ratio[i] = column_bound(from, rows.max[i]) / column_bound(to, rows.max[i]);
#pragma unroll
  for (int i = 0; i < 128; ++i) acc[i] = __float2int_rn(__int2float_rn(acc[i]) * ratio[i / 2 % 2]);
}

template <typename T>
__device__ __forceinline__ void stage_columns(
    uint8_t* staging, int warp, int lane, const int (&acc)[128], int first, const float (&unit)[2]) {
  const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int index = first + 4 * (j + i / 2) + 2 * (i % 2);
      pairs[i] = pack_pair<T>(__int2float_rn(acc[index]) * unit[i % 2],
                              __int2float_rn(acc[index + 1]) * unit[i % 2]);
    }
    stmatrix_x4(staging + row * 128 + ((j + lane / 16) ^ row % 8) * 16, pairs);
  }
}

__device__ __forceinline__ void store_one(const Int8GemmArgs& args, int64_t row, int64_t col, float value) {
  if (row >= args.rows || col >= args.cols) return;
  const int64_t at = row * args.cols + col;
  if (args.out_dtype == DType::kFloat32) {
    static_cast<float*>(args.out)[at] = value;
  } else if (args.out_dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(args.out)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(args.out)[at] = __float2half_rn(value);
  }
}

// A warpgroup's 64 x 256 sums to memory.
__device__ __forceinline__ void store_tile(const Int8GemmParams& params,
                                           const CUtensorMap* out_map,
                                           uint8_t* staging,
                                           const int (&acc)[128],
                                           const RowPair& rows,
                                           float last_bound,
                                           int first_row,
                                           int first_col) {
  const Int8GemmArgs& args = params.args;
  const int thread = read_thread_index() % kWarpgroup, warpgroup = read_thread_index() / kWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  float unit[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) unit[i] = column_bound(last_bound, rows.max[i]) * kInverseLargestCode;
  if (!params.store_by_copy_engine) {
    const int64_t row = first_row + warp * 16 + lane / 4, col = first_col + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      store_one(args, row + i / 2 % 2 * 8, col + i / 4 * 8 + i % 2, __int2float_rn(acc[i]) * unit[i / 2 % 2]);
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint8_t* buffer = staging + part % Int8GemmTraits::kOutBuffers * Int8GemmTraits::kBytesOut;
    if (thread == 0) tma_store_wait_read<Int8GemmTraits::kOutBuffers - 1>();
    named_barrier_sync(1 + warpgroup, kWarpgroup);  // the buffer is free
    if (args.out_dtype == DType::kBFloat16) {
      stage_columns<__nv_bfloat16>(buffer, warp, lane, acc, part * 32, unit);
    } else {
      stage_columns<__half>(buffer, warp, lane, acc, part * 32, unit);
    }
    fence_async_proxy();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    if (thread == 0) {
      tma_store_2d(out_map, buffer, first_col + part * 64, first_row);
      tma_store_commit();
    }
  }
}

__global__ void BITNET_EXT_PAIR_OF_BLOCKS __launch_bounds__(Int8GemmTraits::kThreads, 1)
    sm90_int8_gemm_kernel(const __grid_constant__ Int8GemmParams params,
                          const __grid_constant__ CUtensorMap a_map,
                          const __grid_constant__ CUtensorMap b_map,
                          const __grid_constant__ CUtensorMap out_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = Int8GemmTraits;
  constexpr int kStages = Traits::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];  // as the swizzle needs it
  uint8_t* out_staging = shared + kStages * Traits::kStageBytes;
  uint64_t* full =
      reinterpret_cast<uint64_t*>(out_staging + kConsumers * Traits::kOutBuffers * Traits::kBytesOut);
  uint64_t* empty = full + kStages;

  const WorkSplit& work = params.work;
  const int cluster = static_cast<int>(blockIdx.x);
  const int rank = static_cast<int>(cluster_rank());
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 2 * kConsumers * kWarpgroup / 32);
    }
    mbarrier_init_fence();
    tma_prefetch_map(&a_map);
    tma_prefetch_map(&b_map);
    tma_prefetch_map(&out_map);
  }
  cluster_sync();
  wait_for_previous_kernel();
  allow_next_kernel();

  if (warpgroup == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGemmProducerRegisters));
    if (threadIdx.x == kConsumers * kWarpgroup) {
      WorkCursor cursor(work, cluster);
      WorkPiece piece;
      int stage = 0;
      uint32_t phase = 0;
      while (cursor.next(work, piece)) {
        int row, col;
        params.origin(piece.tile, row, col);
        for (int k = piece.begin; k < piece.end; ++k) {
          mbarrier_wait(empty + stage, phase ^ 1);
          uint8_t* a = shared + stage * Traits::kStageBytes;
          uint8_t* b = a + Traits::kBytesA + rank * Traits::kBytesHalfB;
          mbarrier_arrive_expect(full + stage, Traits::kStageBytes);
          tma_load_2d(a, &a_map, full + stage, k * kStageTokens, row + rank * Traits::kBlockRowsOfA);
          tma_load_2d_multicast(
              b, &b_map, full + stage, k * kStageTokens, col + rank * (kInt8TileCols / 2), 3);
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kGemmConsumerRegisters));
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float last_bound = __ldg(params.args.stage_bound + work.num_stages - 1);
    // A block only ever meets the block of the same rank of other clusters.
    const PartialTile<Traits> shares{
        reinterpret_cast<int4*>(params.args.partials) +
            int64_t{rank} * work.blocks * (Traits::kBlockRowsOfA * kInt8TileCols / 4),
        params.args.flags + rank * work.blocks * kConsumers};
    // One lane for each block of the cluster
    const auto release = [&](int stage) {
      if (lane < 2) mbarrier_arrive_at(empty + stage, static_cast<uint32_t>(lane));
    };

    int acc[1][Traits::kAcc];
    WorkCursor cursor(work, cluster);
    WorkPiece piece;
    int stage = 0;
    uint32_t phase = 0;
    while (cursor.next(work, piece)) {
      int first_row, first_col;
      params.origin(piece.tile, first_row, first_col);
      first_row += rank * Traits::kBlockRowsOfA + warpgroup * 64;
      const RowPair rows(params.args,
                         first_row + static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 + lane / 4);
      float bound = __ldg(params.args.stage_bound + piece.begin);
      for (int k = piece.begin; k < piece.end; ++k) {
        const float next_bound = __ldg(params.args.stage_bound + min(k + 1, piece.end - 1));
        const uint8_t* a = shared + stage * Traits::kStageBytes;
        mbarrier_wait(full + stage, phase);
        const uint64_t a_tile = wgmma_descriptor(a + warpgroup * 64 * kStageTokens);
        const uint64_t b_tile = wgmma_descriptor(a + Traits::kBytesA);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kStageTokens / 32; ++step) {
          wgmma_m64n256_shared(acc[0], a_tile + 2 * step, b_tile + 2 * step, step == 0 ? k > piece.begin : 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k > piece.begin) release((stage == 0 ? kStages : stage) - 1);
        if (next_bound < bound) {
          wgmma_wait<0>();
          wgmma_not_before(acc[0]);
          change_units(acc[0], rows, bound, next_bound);
        }
        bound = next_bound;
        if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      wgmma_wait<0>();
      wgmma_not_before(acc[0]);
      release((stage == 0 ? kStages : stage) - 1);

      if (last_bound < bound) change_units(acc[0], rows, bound, last_bound);
      if (piece.begin > 0) {
        shares.contribute(acc);
        continue;
      }
      if (piece.end < work.num_stages) {
        const int last = work.first_block_beyond(piece.tile);
        shares.await(cluster + 1, last);
        shares.add(cluster + 1, last, 0, acc[0]);
      }
      store_tile(params,
                 &out_map,
                 out_staging + warpgroup * (Traits::kOutBuffers * Traits::kBytesOut),
                 acc[0],
                 rows,
                 last_bound,
                 first_row,
                 first_col);
    }
    // The copy engine reads this block's shared memory, which goes back with the block.
    if (params.store_by_copy_engine && threadIdx.x % kWarpgroup == 0) tma_store_wait_all();
  }
  cluster_sync();  // the other block may still write here
#else
  __trap();  // never launched: the host checks that code for this device was compiled
#endif
}

}  // namespace

cudaError_t launch_sm90_int8_gemm(const Int8GemmArgs& args, const Int8GemmPlan& plan, cudaStream_t stream) {
  using Traits = Int8GemmTraits;
  Int8GemmParams params = {};
  params.args = args;
  const int64_t row_tiles = (args.rows + kInt8TileRows - 1) / kInt8TileRows;
  const int64_t col_tiles = (args.cols + kInt8TileCols - 1) / kInt8TileCols;
  const int64_t tiles = row_tiles * col_tiles, num_stages = args.depth / kStageTokens;
  if ((tiles + plan.clusters) * num_stages > INT32_MAX || args.rows > INT32_MAX - 256 ||
      args.cols > INT32_MAX - 256 || args.depth % kStageTokens != 0 || args.depth > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  if (plan.clusters < 1 || (plan.split_tiles > 0 && plan.split_tiles * num_stages < plan.clusters)) {
    return cudaErrorInvalidConfiguration;
  }
  params.work = {static_cast<int>(tiles),
                 static_cast<int>(plan.split_tiles),
                 static_cast<int>(num_stages),
                 plan.clusters};
  params.row_tiles = static_cast<int>(row_tiles);
  params.col_tiles = static_cast<int>(col_tiles);
  params.rows_fastest = args.rows < args.cols;
  params.store_by_copy_engine = args.out_dtype != DType::kFloat32 && args.cols % 8 == 0 &&
                                reinterpret_cast<uintptr_t>(args.out) % 16 == 0;

  const auto rows = static_cast<cuuint64_t>(args.rows), cols = static_cast<cuuint64_t>(args.cols),
             depth = static_cast<cuuint64_t>(args.depth);
  CUtensorMap a_map, b_map, out_map = {};
  TensorMapSpec spec = {CU_TENSOR_MAP_DATA_TYPE_UINT8,
                        2,
                        {depth, rows},
                        {depth},
                        {kStageTokens, Traits::kBlockRowsOfA},
                        CU_TENSOR_MAP_SWIZZLE_128B};
  cudaError_t status = make_tensor_map(spec, args.a, &a_map);
  if (status != cudaSuccess) return status;
  spec.sizes[1] = cols;
  spec.box[1] = kInt8TileCols / 2;
  status = make_tensor_map(spec, args.b, &b_map);
  if (status != cudaSuccess) return status;
  if (params.store_by_copy_engine) {
    status = make_tensor_map(
        {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, {cols, rows}, {cols * 2}, {64, 64}, CU_TENSOR_MAP_SWIZZLE_128B},
        args.out,
        &out_map);
    if (status != cudaSuccess) return status;
  }
  status = cudaFuncSetAttribute(
      sm90_int8_gemm_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(sm90_int8_gemm_kernel,
                       dim3(static_cast<unsigned>(plan.clusters), 2),
                       dim3(Traits::kThreads),
                       Traits::kSharedBytes,
                       stream,
                       args.dependent_launch,
                       params,
                       a_map,
                       b_map,
                       out_map);
}

}  // namespace bitnet_ext::cuda
