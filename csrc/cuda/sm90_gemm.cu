// y = x * W^T for many tokens on Hopper's int8 tensor cores: wgmma with the weights as the register operand.
//
// A tile is kFeatures features x kTokens tokens. The grid is persistent, one block a multiprocessor (two of
// narrow tiles): a producer warp feeds a ring of stages through the copy engine, two consumer warpgroups,
// each with half of the features, compute. A stage holds 2 x 128 columns of K: x as two [kTokens][128 bytes]
// in the 128-byte swizzle, and the weights as they lie in memory, blocks of 16 x 128 in fragment order
// (csrc/prepacked.h). Operand B of wgmma is the stage's x; operand A is unpacked by shift and mask from one
// 16-byte read a thread and 16 x 128 block, so the weights cross shared memory at 2 bits, and half of its
// bandwidth stays free.
//
// The products of 128 columns (64 in some tiles) are one group; while it runs, the next ones are unpacked
// into a second set of registers, so the tensor cores always have a group queued. A product reads its
// registers until a wait has seen its group done, which the compiler does not know: what writes them must be
// held behind the wait (ptx/wgmma.cuh; tools/wgmma_hazards.py checks the machine code).
//
// A second producing warp brings the scales of the tile to shared memory while the tile is computed.
//
// Tiles go feature-fastest: the weights, the smaller operand, stay in L2 while x streams. When the tiles do
// not fill the last wave, the first ones are split along K (common/work_split.cuh), exactly, in int32.
//
// D is features x tokens; stmatrix transposes it into [token][64 features] for the store. 32-bit results are
// stored straight from the registers, whole 32-byte sectors at a time.
//
// Bound: tensor cores (M >= about 128), reading the weights below that.
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/common/weight.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90_gemm.h"
#include "cuda/sm90_tile.cuh"

namespace bitnet_ext::cuda {
namespace {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    sm90_gemm_kernel(const __grid_constant__ Sm90Params params,
                     const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ CUtensorMap out_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Weight = typename Traits::Weight;
  constexpr int kStages = Traits::kStages, kRowBlocks = Traits::kRowBlocks, kTokens = Traits::kTokens;
  extern __shared__ __align__(1024) uint8_t shared[];  // as the swizzle needs it
  uint8_t* out_staging = shared + kStages * Traits::kStageBytes;
  ColumnFactors* factors = reinterpret_cast<ColumnFactors*>(out_staging + kConsumers * Traits::kBytesOut);
  float* act_scales = reinterpret_cast<float*>(factors + Traits::kFeatures);
  uint64_t* full = reinterpret_cast<uint64_t*>(act_scales + kTokens);
  uint64_t* empty = full + kStages;
  const TileScales<Traits> scales{factors, act_scales, empty + kStages, empty + kStages + 1};

  const WorkSplit& work = params.work;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, kConsumers * kWarpgroup / 32);
    }
    mbarrier_init(scales.full, 32);
    mbarrier_init(scales.empty, kConsumers * kWarpgroup);
    mbarrier_init_fence();
    tma_prefetch_map(&x_map);
    tma_prefetch_map(&weight_map);
    tma_prefetch_map(&out_map);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  if (warpgroup == kConsumers) {
    if constexpr (!Traits::kNarrow) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    }
    const int warp = static_cast<int>(threadIdx.x) / 32 - kConsumers * kWarpgroup / 32;
    if (warp == 0 && threadIdx.x % 32 == 0) {  // one thread gives the copy engine its work
      WorkCursor cursor(work, static_cast<int>(blockIdx.x));
      WorkPiece piece;
      int stage = 0;
      uint32_t phase = 0;
      while (cursor.next(work, piece)) {
        const int first_m = piece.tile / params.feature_tiles * kTokens;
        const int first_tile = piece.tile % params.feature_tiles * (Traits::kFeatures / kBlockRows);
        for (int k_stage = piece.begin; k_stage < piece.end; ++k_stage) {
          mbarrier_wait(empty + stage, phase ^ 1);
          uint8_t* stage_data = shared + stage * Traits::kStageBytes;
          mbarrier_arrive_expect(full + stage, Traits::kStageBytes);
          tma_load_3d(stage_data + kHalves * Traits::kBytesX,
                      &weight_map,
                      full + stage,
                      0,
                      k_stage * kHalves * Weight::kVectors,
                      first_tile);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            tma_load_2d(stage_data + half * Traits::kBytesX,
                        &x_map,
                        full + stage,
                        (k_stage * kHalves + half) * kBlockCols,
                        first_m);
          }
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    } else if (warp == 1 && !params.product.raw) {
      WorkCursor cursor(work, static_cast<int>(blockIdx.x));
      WorkPiece piece;
      uint32_t phase = 0;
      while (cursor.next(work, piece)) {
        if (piece.begin > 0) continue;  // another block stores that tile
        scales.load(params.product,
                    piece.tile % params.feature_tiles * Traits::kFeatures,
                    piece.tile / params.feature_tiles * kTokens,
                    static_cast<int>(threadIdx.x) % 32,
                    phase);
        phase ^= 1;
      }
    }
  } else {
    if constexpr (!Traits::kNarrow) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    }
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int warp = thread / 32, lane = thread % 32;
    const TileStore<Traits> store{params,
                                  &out_map,
                                  out_staging + warpgroup * Traits::kBytesOut,
                                  factors + warpgroup * kRowBlocks * 64,
                                  act_scales};
    const PartialTile<Traits> shares{reinterpret_cast<int4*>(params.product.partials), params.product.flags};

    // Where this thread's vectors of weights lie in a stage
    const int weight_offset =
        kHalves * (Traits::kBytesX + (warpgroup * kRowBlocks * 4 + warp) * Traits::kBytesTile) + lane * 16;
    int acc[Traits::kChains][kRowBlocks][Traits::kAcc];
    uint4 packed[kRowBlocks][Weight::kVectors];
    uint32_t a[2][kRowBlocks][Traits::kSteps][4];  // of two groups
    WorkCursor cursor(work, static_cast<int>(blockIdx.x));
    WorkPiece piece;
    int stage = 0;
    uint32_t phase = 0, scales_phase = 0;
    while (cursor.next(work, piece)) {
      for (int k_stage = piece.begin; k_stage < piece.end; ++k_stage) {
        const uint8_t* stage_data = shared + stage * Traits::kStageBytes;
        mbarrier_wait(full + stage, phase);
        const int accumulate = k_stage > piece.begin;
#pragma unroll
        for (int group = 0; group < Traits::kGroups; ++group) {
          constexpr int kSteps = Traits::kSteps;
          constexpr int kBuffers = 2;
          uint32_t(&mine)[kRowBlocks][kSteps][4] = a[group % kBuffers];
          const int half = group * kSteps / kStepsPerBlock, first = group * kSteps % kStepsPerBlock;
          // The vectors that this group needs: all steps of a block of ternary weights lie in one
          const auto load_weights = [&] {
            constexpr bool kOneEach = Traits::kOperandsFromMemory;
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
              const uint8_t* weights =
                  stage_data + weight_offset + (block * 4 * kHalves + half) * Traits::kBytesTile;
#pragma unroll
              for (int v = kOneEach ? first : 0; v < (kOneEach ? first + kSteps : 1); ++v) {
                load_shared_16(weights + v * 512, packed[block][v]);
              }
            }
          };
          if (!Traits::kOperandsFromMemory && first == 0) load_weights();  // ahead of the wait

          wgmma_wait<1>();  // the group that used these registers
          // With the last stage's last group done, nothing reads that stage any more.
          if (group == 1 && k_stage > piece.begin && lane == 0) {
            mbarrier_arrive(empty + (stage == 0 ? kStages : stage) - 1);
          }
          if (Traits::kOperandsFromMemory) load_weights();
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
            if (!Traits::kOperandsFromMemory) wgmma_not_before(packed[block][0]);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              Weight::fragment(packed[block], first + step, mine[block][step]);
            }
#pragma unroll
            for (int step = 0; step < kSteps; ++step) wgmma_operand(mine[block][step]);
          }
          const uint64_t b = wgmma_descriptor(stage_data + half * Traits::kBytesX) + 2 * first;
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
              Wgmma<kTokens>::multiply(acc[step % Traits::kChains][block],
                                       mine[block][step],
                                       b + 2 * step,
                                       group == 0 && step < Traits::kChains ? accumulate : 1);
            }
          }
          wgmma_commit();
        }
        if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int chain = 0; chain < Traits::kChains; ++chain) {
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) wgmma_not_before(acc[chain][block]);
      }
      if (lane == 0) mbarrier_arrive(empty + (stage == 0 ? kStages : stage) - 1);

#pragma unroll
      for (int chain = 1; chain < Traits::kChains; ++chain) {
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
          for (int i = 0; i < Traits::kAcc; ++i) acc[0][block][i] += acc[chain][block][i];
        }
      }

      if (piece.begin > 0) {
        shares.contribute(acc[0]);
        continue;
      }
      const int first = static_cast<int>(blockIdx.x) + 1;
      int last = first;  // the launcher leaves no block without a share, so contributors follow each other
      if (piece.end < work.num_stages) {
        last = work.first_block_beyond(piece.tile);
        shares.await(first, last);
      }
      if (!params.product.raw) mbarrier_wait(scales.full, scales_phase);
      const int first_n =
          piece.tile % params.feature_tiles * Traits::kFeatures + warpgroup * (kRowBlocks * 64);
      const int first_m = piece.tile / params.feature_tiles * kTokens;
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        shares.add(first, last, block, acc[0][block]);
        store.run(acc[0][block], block, first_n, first_m);
      }
      if (!params.product.raw) {
        mbarrier_arrive(scales.empty);
        scales_phase ^= 1;
      }
    }
    // The copy engine reads this block's shared memory, which goes back with the block.
    if (params.store_by_copy_engine && thread == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
#else
  __trap();  // never launched: the host checks that code for this device was compiled
#endif
}

template <typename Traits>
cudaError_t launch(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream) {
  using Weight = typename Traits::Weight;
  const int64_t num_kb = block_cols(args.K), tiles_n = block_rows(args.N);
  const int64_t num_stages = (num_kb + kHalves - 1) / kHalves;  // of a tile
  Sm90Params params = {};
  params.product = args;
  const int64_t tiles = sm90_tiles(args, plan);
  if ((tiles + plan.blocks) * num_stages > INT32_MAX || args.M > INT32_MAX - 256 ||
      args.N > INT32_MAX - 256) {
    return cudaErrorInvalidConfiguration;
  }
  if (plan.split_tiles > 0 && plan.split_tiles * num_stages < plan.blocks)
    return cudaErrorInvalidConfiguration;
  params.feature_tiles = static_cast<int>((args.N + Traits::kFeatures - 1) / Traits::kFeatures);
  params.work = {static_cast<int>(tiles),
                 static_cast<int>(plan.split_tiles),
                 static_cast<int>(num_stages),
                 static_cast<int>(plan.blocks)};
  const uint64_t out_row_bytes = static_cast<uint64_t>(args.N) * 2;
  params.store_by_copy_engine = !args.raw && args.out_dtype != DType::kFloat32 && out_row_bytes % 16 == 0 &&
                                reinterpret_cast<uintptr_t>(args.out) % 16 == 0;

  CUtensorMap x_map, weight_map, out_map = {};
  const auto K = static_cast<cuuint64_t>(args.K), M = static_cast<cuuint64_t>(args.M);
  cudaError_t status = make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT8,
                                        2,
                                        {K, M},
                                        {K},
                                        {kBlockCols, Traits::kTokens},
                                        CU_TENSOR_MAP_SWIZZLE_128B},
                                       args.x_i8,
                                       &x_map);
  if (status != cudaSuccess) return status;
  const auto row_of_blocks = static_cast<cuuint64_t>(num_kb) * Weight::kVectors;
  status = make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT32,
                            3,
                            {128, row_of_blocks, static_cast<cuuint64_t>(tiles_n)},
                            {512, row_of_blocks * 512},
                            {128, kHalves * Weight::kVectors, Traits::kFeatures / kBlockRows},
                            CU_TENSOR_MAP_SWIZZLE_NONE},
                           args.weight,
                           &weight_map);
  if (status != cudaSuccess) return status;
  if (params.store_by_copy_engine) {
    status = make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT16,
                              2,
                              {static_cast<cuuint64_t>(args.N), M},
                              {out_row_bytes},
                              {64, Traits::kTokens},
                              CU_TENSOR_MAP_SWIZZLE_128B},
                             args.out,
                             &out_map);
    if (status != cudaSuccess) return status;
  }

  const auto kernel = sm90_gemm_kernel<Traits>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel,
                       dim3(plan.blocks),
                       dim3(Traits::kThreads),
                       Traits::kSharedBytes,
                       stream,
                       args.dependent_launch,
                       params,
                       x_map,
                       weight_map,
                       out_map);
}

template <typename Weight, int kFeatures>
cudaError_t launch_tokens(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream) {
  switch (plan.tokens) {
    case 16:
      return launch<Sm90Traits<Weight, 128, 16>>(args, plan, stream);
    case 32:
      return launch<Sm90Traits<Weight, 128, 32>>(args, plan, stream);
    case 64:
      return launch<Sm90Traits<Weight, kFeatures, 64>>(args, plan, stream);
    case 128:
      // int8 weights would need more registers than there are
      if constexpr (kFeatures * Weight::kVectors <= 512) {
        return launch<Sm90Traits<Weight, kFeatures, 128>>(args, plan, stream);
      }
      return cudaErrorInvalidValue;
    case 192:
      if constexpr (kFeatures * Weight::kVectors == 128) {
        return launch<Sm90Traits<Weight, 128, 192>>(args, plan, stream);
      }
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Weight>
cudaError_t launch_features(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream) {
  if (plan.features == 256 && plan.tokens < 64) return cudaErrorInvalidValue;
  if (plan.features == 128) return launch_tokens<Weight, 128>(args, plan, stream);
  if (plan.features == 256) return launch_tokens<Weight, 256>(args, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_is_compiled() {
#ifdef BITNET_EXT_SM90A
  return true;
#else
  return false;
#endif
}

cudaError_t launch_sm90_gemm(const ProductArgs& args, const Sm90Plan& plan, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (is_ternary(args)) return launch_features<TernaryWeight>(args, plan, stream);
  return launch_features<Int8Weight>(args, plan, stream);
}

}  // namespace bitnet_ext::cuda
