// y = x * W^T for many tokens on Hopper's int8 tensor cores: wgmma with the weights as the register operand.
//
// A tile is kFeatures features x kTokens tokens. The grid is persistent, one block a multiprocessor: a
// producer warp feeds a ring of stages through the copy engine, two consumer warpgroups, each with half of
// the features, compute. A stage holds 2 x 128 columns of K: x as two [kTokens][128 bytes] in the 128-byte
// swizzle, and the weights as they lie in memory, blocks of 16 x 128 in fragment order (csrc/prepacked.h).
// Operand B of wgmma is the stage's x; operand A is unpacked by shift and mask from one 16-byte read a thread
// and 16 x 128 block, so the weights cross shared memory at 2 bits, and half of its bandwidth stays free.
//
// The products of 128 columns (64 in some tiles) are one group; while it runs, the next ones are unpacked
// into a second set of registers, so the tensor cores always have a group queued.
//
// Tiles go feature-fastest: the weights, the smaller operand, stay in L2 while x streams. When the tiles do
// not fill the last wave, the first ones are split along K (common/work_split.cuh), exactly, in int32.
//
// D is features x tokens; stmatrix transposes it into [token][64 features] for the store. 32-bit results are
// stored straight from the registers, whole 32-byte sectors at a time.
//
// Bound: tensor cores (M >= about 128), reading the weights below that.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/common/weight.cuh"
#include "cuda/common/work_split.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90_gemm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroup = 128;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kMaxShared = 227 * 1024;
constexpr int kHalves = 2;  // of a stage, 128 columns of K each

template <typename Weight_, int kFeatures_, int kTokens_>
struct Sm90Traits {
  using Weight = Weight_;
  static constexpr int kFeatures = kFeatures_, kTokens = kTokens_;
  static constexpr int kRowBlocks = kFeatures / kConsumers / 64;  // m64 blocks of a warpgroup
  static constexpr int kAcc = kTokens / 2;                        // sums a thread has of an m64 block
  // Narrow tiles wait for latencies, not for the tensor cores: several blocks share a multiprocessor, and the
  // K steps go to separate sums, so that products need not wait for each other.
  static constexpr bool kNarrow = kTokens <= 32;
  static constexpr int kBlocksPerSm = sm90_blocks_per_sm(kTokens);
  static constexpr int kChains = kTokens <= 16 ? 2 : kTokens == 64 && kRowBlocks == 1 ? 2 : 1;
  // K steps of a group of products, and groups of a stage. The widest and the narrow tiles have no
  // registers for two groups of 4.
  static constexpr int kSteps = kNarrow || kRowBlocks * kTokens >= 256 ? 2 : kStepsPerBlock;
  static constexpr int kGroups = kHalves * kStepsPerBlock / kSteps;
  static_assert(kChains <= kSteps, "the first group starts every chain of sums");
  // A narrow tile's producer is a warp. A wide one's is a warpgroup, because registers are handed over by
  // warpgroups.
  static constexpr int kThreads = kConsumers * kWarpgroup + (kNarrow ? 32 : kWarpgroup);
  static constexpr int kBytesX = kTokens * kBlockCols;       // of a half
  static constexpr int kBytesTile = 512 * Weight::kVectors;  // of 16 x 128 weights
  static constexpr int kBytesW = kFeatures / kBlockRows * kHalves * kBytesTile;
  static constexpr int kStageBytes = kHalves * kBytesX + kBytesW;
  static constexpr int kBytesOut = kTokens * 128;  // 64 features in 16 bits
  static constexpr int kOutBuffers = kConsumers * kRowBlocks;
  static constexpr int kFixedBytes = 1024 + kOutBuffers * kBytesOut + kConsumers * kTokens * 4 + 256;
  static constexpr int kFit =
      (kMaxShared / kBlocksPerSm - 1024 * (kBlocksPerSm - 1) - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 2, "the ring must be deep enough to hide the copy engine's latency");
  static_assert(kStageBytes % 1024 == 0, "swizzled tiles start at multiples of 1,024 bytes");
};

struct Sm90Params {
  ProductArgs product;
  WorkSplit work;
  int feature_tiles;
  bool store_by_copy_engine;  // 16-bit results in rows that it can write
};

__device__ __forceinline__ uint32_t pack_16_bit(float low, float high, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// One consumer warpgroup's share of a tile, from its sums to memory.
template <typename Traits>
struct TileStore {
  static constexpr int kTokens = Traits::kTokens;
  const Sm90Params& params;
  const CUtensorMap* out_map;
  uint8_t* staging;   // [kRowBlocks][kTokens][128 bytes], swizzled
  float* act_scales;  // [kTokens]
  int warpgroup, thread;

  __device__ __forceinline__ void run(int (&acc)[Traits::kRowBlocks][Traits::kAcc],
                                      int first_n,
                                      int first_m) const {
    const ProductArgs& args = params.product;
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const bool staged = !args.raw && args.out_dtype != DType::kFloat32;
    if (!args.raw) {
      for (int token = thread; token < kTokens; token += kWarpgroup) {
        act_scales[token] = first_m + token < args.M ? args.act_scale[first_m + token] : 0.0f;
      }
    }
    if (staged && params.store_by_copy_engine && thread == 0) tma_store_wait_read();
    named_barrier_sync(1 + warpgroup, kWarpgroup);

#pragma unroll
    for (int block = 0; block < Traits::kRowBlocks; ++block) {
      const int n = first_n + block * 64 + warp * 16 + g;
      ColumnFactors factors[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factors[i] = n + 8 * i < args.N ? column_factors(args, n + 8 * i) : ColumnFactors{0.0f, 0.0f};
      }
      const auto output = [&](int index, float act_scale) {
        return scaled_output(
            args, acc[block][index] >> Traits::Weight::kShift, act_scale, factors[index / 2 % 2]);
      };
      if (staged) {
        uint8_t* target = staging + block * Traits::kBytesOut;
#pragma unroll
        for (int j = 0; j < kTokens / 8; j += 2) {
          uint32_t pairs[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 scale = *reinterpret_cast<const float2*>(act_scales + (j + i) * 8 + 2 * t);
            const int index = (j + i) * 4;
            pairs[2 * i] = pack_16_bit(output(index, scale.x), output(index + 1, scale.y), args.out_dtype);
            pairs[2 * i + 1] =
                pack_16_bit(output(index + 2, scale.x), output(index + 3, scale.y), args.out_dtype);
          }
          const int token = (j + lane / 16) * 8 + lane % 8;
          const int piece = (2 * warp + lane / 8 % 2) ^ lane % 8;
          stmatrix_x4_transposed(target + token * 128 + piece * 16, pairs);
        }
      } else {
#pragma unroll
        for (int index = 0; index < Traits::kAcc; ++index) {
          const int token = index / 4 * 8 + 2 * t + index % 2;
          const int row = n + index / 2 % 2 * 8;
          if (first_m + token >= args.M || row >= args.N) continue;
          const int64_t offset = static_cast<int64_t>(first_m + token) * args.N + row;
          if (args.raw) {
            static_cast<int32_t*>(args.out)[offset] = acc[block][index] >> Traits::Weight::kShift;
          } else {
            static_cast<float*>(args.out)[offset] = output(index, act_scales[token]);
          }
        }
      }
    }
    if (!staged) {
      named_barrier_sync(1 + warpgroup, kWarpgroup);  // the act_scales have been read
      return;
    }
    if (params.store_by_copy_engine) fence_async_proxy();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    if (params.store_by_copy_engine) {
      if (thread == 0) {
#pragma unroll
        for (int block = 0; block < Traits::kRowBlocks; ++block) {
          tma_store_2d(out_map, staging + block * Traits::kBytesOut, first_n + block * 64, first_m);
        }
        tma_store_commit();
      }
      return;
    }
    for (int i = thread; i < Traits::kRowBlocks * 64 * kTokens; i += kWarpgroup) {
      const int feature = i % 64, token = i / 64 % kTokens, block = i / 64 / kTokens;
      const int n = first_n + block * 64 + feature;
      if (first_m + token >= args.M || n >= args.N) continue;
      const int piece = feature / 8 ^ token % 8;
      static_cast<uint16_t*>(args.out)[static_cast<int64_t>(first_m + token) * args.N + n] =
          *reinterpret_cast<const uint16_t*>(staging + block * Traits::kBytesOut + token * 128 + piece * 16 +
                                             feature % 8 * 2);
    }
    named_barrier_sync(1 + warpgroup, kWarpgroup);
  }
};

// The sums of a tile that several blocks share. A warpgroup only ever meets the same warpgroup of other
// blocks, whose threads hold the sums of the same places, so a partial tile is a plain dump of registers.
template <typename Traits>
struct PartialTile {
  static constexpr int kSums = Traits::kRowBlocks * Traits::kAcc;  // of a thread
  int4* partials;                                                  // [blocks][kConsumers][kSums / 4][128]
  uint32_t* flags;                                                 // [blocks][kConsumers]
  int warpgroup, thread;

  __device__ __forceinline__ int4* of_block(int block) const {
    return partials + (int64_t{block} * kConsumers + warpgroup) * (kSums / 4) * kWarpgroup + thread;
  }

  __device__ __forceinline__ void contribute(const int (&acc)[Traits::kRowBlocks][Traits::kAcc]) const {
    int4* mine = of_block(static_cast<int>(blockIdx.x));
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const int* sums = acc[i * 4 / Traits::kAcc] + i * 4 % Traits::kAcc;
      __stcg(mine + i * kWarpgroup, make_int4(sums[0], sums[1], sums[2], sums[3]));
    }
    __threadfence();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    if (thread == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flags + blockIdx.x * kConsumers + warpgroup)
                   : "memory");
    }
  }

  // Adds what blocks first .. last - 1 have contributed. Their flags are awaited side by side, a thread each:
  // one after the other they would cost a trip to L2 each.
  __device__ __forceinline__ void collect(int first,
                                          int last,
                                          int (&acc)[Traits::kRowBlocks][Traits::kAcc]) const {
#pragma unroll 1
    for (int block = first + thread; block < last; block += kWarpgroup) {
      uint32_t* flag = flags + block * kConsumers + warpgroup;
      uint32_t ready = 0;
      while (ready == 0) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
      }
      *flag = 0;  // as the next launch has to find it
    }
    __threadfence();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    constexpr int kInFlight = kSums <= 8 ? 4 : 1;  // of the others' tiles, as registers allow
#pragma unroll kInFlight
    for (int block = first; block < last; ++block) {
      const int4* other = of_block(block);
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const int4 v = __ldcg(other + i * kWarpgroup);
        int* sums = acc[i * 4 / Traits::kAcc] + i * 4 % Traits::kAcc;
        sums[0] += v.x;
        sums[1] += v.y;
        sums[2] += v.z;
        sums[3] += v.w;
      }
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    sm90_gemm_kernel(const __grid_constant__ Sm90Params params,
                     const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ CUtensorMap out_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Weight = typename Traits::Weight;
  constexpr int kStages = Traits::kStages, kRowBlocks = Traits::kRowBlocks, kTokens = Traits::kTokens;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* out_staging = shared + kStages * Traits::kStageBytes;
  float* act_scales = reinterpret_cast<float*>(out_staging + Traits::kOutBuffers * Traits::kBytesOut);
  uint64_t* full = reinterpret_cast<uint64_t*>(act_scales + kConsumers * kTokens);
  uint64_t* empty = full + kStages;

  const WorkSplit& work = params.work;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, kConsumers * kWarpgroup / 32);
    }
    mbarrier_init_fence();
    tma_prefetch_map(&x_map);
    tma_prefetch_map(&weight_map);
    tma_prefetch_map(&out_map);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  if (warpgroup == kConsumers) {
    // Producer: one thread
    if constexpr (!Traits::kNarrow) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    }
    if (threadIdx.x == kConsumers * kWarpgroup) {
      WorkCursor cursor(work, static_cast<int>(blockIdx.x));
      WorkPiece piece;
      int stage = 0;
      uint32_t phase = 0;
      while (cursor.next(work, piece)) {
        const int first_m = piece.tile / params.feature_tiles * kTokens;
        const int first_tile = piece.tile % params.feature_tiles * (Traits::kFeatures / kBlockRows);
        for (int kb = piece.begin; kb < piece.end; ++kb) {
          mbarrier_wait(empty + stage, phase ^ 1);
          uint8_t* x_stage = shared + stage * Traits::kStageBytes;
          mbarrier_arrive_expect(full + stage, Traits::kStageBytes);
          tma_load_3d(x_stage + kHalves * Traits::kBytesX,
                      &weight_map,
                      full + stage,
                      0,
                      kb * kHalves * Weight::kVectors,
                      first_tile);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            tma_load_2d(x_stage + half * Traits::kBytesX,
                        &x_map,
                        full + stage,
                        (kb * kHalves + half) * kBlockCols,
                        first_m);
          }
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
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
                                  out_staging + warpgroup * kRowBlocks * Traits::kBytesOut,
                                  act_scales + warpgroup * kTokens,
                                  warpgroup,
                                  thread};
    const PartialTile<Traits> shares{
        reinterpret_cast<int4*>(params.product.partials), params.product.flags, warpgroup, thread};

    // Where this thread's vectors of weights lie in a stage
    const int weight_offset =
        kHalves * (Traits::kBytesX + (warpgroup * kRowBlocks * 4 + warp) * Traits::kBytesTile) + lane * 16;
    int acc[Traits::kChains][kRowBlocks][Traits::kAcc];
    uint4 packed[kRowBlocks][Weight::kVectors];
    uint32_t a[2][kRowBlocks][Traits::kSteps][4];  // of two groups
    WorkCursor cursor(work, static_cast<int>(blockIdx.x));
    WorkPiece piece;
    int stage = 0;
    uint32_t phase = 0;
    while (cursor.next(work, piece)) {
      for (int kb = piece.begin; kb < piece.end; ++kb) {
        const uint8_t* x_stage = shared + stage * Traits::kStageBytes;
        mbarrier_wait(full + stage, phase);
        const int accumulate = kb > piece.begin;
#pragma unroll
        for (int group = 0; group < Traits::kGroups; ++group) {
          constexpr int kSteps = Traits::kSteps;
          constexpr int kBuffers = 2;
          uint32_t(&mine)[kRowBlocks][kSteps][4] = a[group % kBuffers];
          const int half = group * kSteps / kStepsPerBlock, first = group * kSteps % kStepsPerBlock;
          if (first == 0) {
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
              for (int v = 0; v < Weight::kVectors; ++v) {
                packed[block][v] = *reinterpret_cast<const uint4*>(
                    x_stage + weight_offset + (block * 4 * kHalves + half) * Traits::kBytesTile + v * 512);
              }
            }
          }

          wgmma_wait<1>();  // the group that used these registers
          // With the last stage's last group done, nothing reads that stage any more.
          if (group == 1 && kb > piece.begin && lane == 0) {
            mbarrier_arrive(empty + (stage == 0 ? kStages : stage) - 1);
          }
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
            if (first == 0) {
              Weight::template fragment<0>(packed[block], mine[block][0]);
              Weight::template fragment<1>(packed[block], mine[block][1]);
              if constexpr (kSteps == 4) {
                Weight::template fragment<2>(packed[block], mine[block][2]);
                Weight::template fragment<3>(packed[block], mine[block][3]);
              }
            } else {
              Weight::template fragment<2>(packed[block], mine[block][0]);
              Weight::template fragment<3>(packed[block], mine[block][1]);
            }
#pragma unroll
            for (int step = 0; step < kSteps; ++step) wgmma_operand(mine[block][step]);
          }
          const uint64_t b = wgmma_descriptor(x_stage + half * Traits::kBytesX) + 2 * first;
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
      if (piece.end < work.num_stages) {
        // The launcher leaves no block without a share, so the contributors follow each other.
        const int tile_end = (piece.tile + 1) * work.num_stages, first = static_cast<int>(blockIdx.x) + 1;
        int last = first;
        while (work.share_begin(last) < tile_end) ++last;
        shares.collect(first, last, acc[0]);
      }
      store.run(acc[0],
                piece.tile % params.feature_tiles * Traits::kFeatures + warpgroup * (kRowBlocks * 64),
                piece.tile / params.feature_tiles * kTokens);
    }
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
