// A tile of sm90_gemm.cu: its sizes, its scales, how the sums of a tile that several blocks share come
// together, and the way from sums to memory.
#pragma once

#include "cuda/common/epilogue.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/common/work_split.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90_gemm.h"

namespace bitnet_ext::cuda {

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
  // int8 weights are operands as they lie in memory. They must not be loaded before the products that read
  // the same registers are done: the compiler does not know that those still do.
  static constexpr bool kOperandsFromMemory = Weight::kVectors > 1;
  static_assert(kChains <= kSteps, "the first group starts every chain of sums");
  // Two warps produce, one the stages and one the scales. In a wide tile they belong to a whole warpgroup,
  // because registers are handed over by warpgroups.
  static constexpr int kThreads = kConsumers * kWarpgroup + (kNarrow ? 64 : kWarpgroup);
  static constexpr int kBytesX = kTokens * kBlockCols;       // of a half
  static constexpr int kBytesTile = 512 * Weight::kVectors;  // of 16 x 128 weights
  static constexpr int kBytesW = kFeatures / kBlockRows * kHalves * kBytesTile;
  static constexpr int kStageBytes = kHalves * kBytesX + kBytesW;
  static constexpr int kBytesOut = kTokens * 128;  // 64 features in 16 bits
  static constexpr int kBarriers = 256;            // bytes
  static constexpr int kFixedBytes = kConsumers * kBytesOut + kFeatures * 8 + kTokens * 4 + kBarriers;
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

// The scales and the bias of a tile in shared memory. A warp of its own brings them there while the tile is
// computed. With this, and with outputs that do not branch on their type, the end of a tile takes 3,900
// clocks and not 4,700, beside 32,500 of products (K = 4,096).
template <typename Traits>
struct TileScales {
  ColumnFactors* factors;  // [kFeatures]
  float* act_scales;       // [kTokens]
  uint64_t* full;
  uint64_t* empty;

  __device__ __forceinline__ void load(
      const ProductArgs& args, int first_n, int first_m, int lane, uint32_t phase) const {
    mbarrier_wait(empty, phase ^ 1);
    for (int i = lane; i < Traits::kTokens; i += 32) {
      act_scales[i] = first_m + i < args.M ? args.act_scale[first_m + i] : 0.0f;
    }
    for (int i = lane; i < Traits::kFeatures; i += 32) {
      factors[i] = first_n + i < args.N ? column_factors(args, first_n + i) : ColumnFactors{0.0f, 0.0f};
    }
    mbarrier_arrive(full);
  }
};

// threadIdx.x, read anew: addresses that depend on it are then computed at the end of a tile and not kept,
// through the main loop, in registers that are not there.
__device__ __forceinline__ int read_thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// One consumer warpgroup's share of a tile, from its sums to memory.
template <typename Traits>
struct TileStore {
  static constexpr int kTokens = Traits::kTokens;
  const Sm90Params& params;
  const CUtensorMap* out_map;
  uint8_t* staging;              // [kTokens][128 bytes], swizzled
  const ColumnFactors* factors;  // of this warpgroup's features
  const float* act_scales;

  // Row block `block` of 64 features of the warpgroup's share, which begins at feature first_n.
  __device__ __forceinline__ void run(const int (&acc)[Traits::kAcc],
                                      int block,
                                      int first_n,
                                      int first_m) const {
    const ProductArgs& args = params.product;
    const int thread = read_thread_index() % kWarpgroup;
    if (args.raw || args.out_dtype == DType::kFloat32) {
      store_32_bit(thread, acc, factors + block * 64, first_n + block * 64, first_m);
    } else {
      store_16_bit(thread, acc, factors + block * 64, first_n + block * 64, first_m);
    }
  }

 private:
  // Of 64, the first of the two rows of a thread; the other is 8 further on.
  static __device__ __forceinline__ int row(int thread) {
    return thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ __forceinline__ void store_32_bit(int thread,
                                               const int (&acc)[Traits::kAcc],
                                               const ColumnFactors* factors,
                                               int first_n,
                                               int first_m) const {
    const ProductArgs& args = params.product;
    const int n = first_n + row(thread), first_token = first_m + 2 * (thread % 4);
    const ColumnFactors mine[2] = {factors[row(thread)], factors[row(thread) + 8]};
    const float* scales = act_scales + 2 * (thread % 4);
    uint32_t* out = static_cast<uint32_t*>(args.out) + first_token * args.N + n;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first_token + j * 8 + i % 2, eight = i / 2 * 8;
        if (token >= args.M || n + eight >= args.N) continue;
        const int sum = acc[4 * j + i] >> Traits::Weight::kShift;
        out[i % 2 * args.N + eight] =
            args.raw ? static_cast<uint32_t>(sum)
                     : __float_as_uint(scaled_output(args, sum, scales[j * 8 + i % 2], mine[i / 2]));
      }
      out += 8 * args.N;
    }
  }

  // Type and bias are chosen once a tile: chosen at each output, they would be instructions between the
  // tiles.
  template <typename T, bool kBias>
  __device__ __forceinline__ void stage(int thread,
                                        const int (&acc)[Traits::kAcc],
                                        const ColumnFactors* factors) const {
    const int warp = thread / 32, lane = thread % 32;
    const ColumnFactors mine[2] = {factors[row(thread)], factors[row(thread) + 8]};
    const auto output = [&](int index, float act_scale) {
      return scaled_output<kBias>(acc[index] >> Traits::Weight::kShift, act_scale, mine[index / 2 % 2]);
    };
    const float* scales = act_scales + 2 * (lane % 4);
    uint8_t* target =
        staging + (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 scale = *reinterpret_cast<const float2*>(scales + (j + i) * 8);
        const int index = (j + i) * 4;
        pairs[2 * i] = pack_pair<T>(output(index, scale.x), output(index + 1, scale.y));
        pairs[2 * i + 1] = pack_pair<T>(output(index + 2, scale.x), output(index + 3, scale.y));
      }
      stmatrix_x4_transposed(target + j * 8 * 128, pairs);
    }
  }

  template <typename T>
  __device__ __forceinline__ void stage(int thread,
                                        const int (&acc)[Traits::kAcc],
                                        const ColumnFactors* factors) const {
    if (params.product.bias != nullptr) {
      stage<T, true>(thread, acc, factors);
    } else {
      stage<T, false>(thread, acc, factors);
    }
  }

  __device__ __forceinline__ void store_16_bit(int thread,
                                               const int (&acc)[Traits::kAcc],
                                               const ColumnFactors* factors,
                                               int first_n,
                                               int first_m) const {
    const ProductArgs& args = params.product;
    const int warpgroup = read_thread_index() / kWarpgroup;
    if (params.store_by_copy_engine && thread == 0) tma_store_wait_read();
    named_barrier_sync(1 + warpgroup, kWarpgroup);  // the staging is free
    if (args.out_dtype == DType::kBFloat16) {
      stage<__nv_bfloat16>(thread, acc, factors);
    } else {
      stage<__half>(thread, acc, factors);
    }
    if (params.store_by_copy_engine) fence_async_proxy();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    if (params.store_by_copy_engine) {
      if (thread == 0) {
        tma_store_2d(out_map, staging, first_n, first_m);
        tma_store_commit();
      }
      return;
    }
#pragma unroll 1
    for (int i = thread; i < 64 * kTokens; i += kWarpgroup) {
      const int feature = i % 64, token = i / 64;
      if (first_m + token >= args.M || first_n + feature >= args.N) continue;
      const int piece = feature / 8 ^ token % 8;
      static_cast<uint16_t*>(args.out)[static_cast<int64_t>(first_m + token) * args.N + first_n + feature] =
          *reinterpret_cast<const uint16_t*>(staging + token * 128 + piece * 16 + feature % 8 * 2);
    }
  }
};

// The sums of a tile that several blocks share. A warpgroup only ever meets the same warpgroup of other
// blocks, whose threads hold the sums of the same places, so a partial tile is a plain dump of registers.
template <typename Traits>
struct PartialTile {
  static constexpr int kSums = Traits::kRowBlocks * Traits::kAcc;  // of a thread
  int4* partials;                                                  // [blocks][kConsumers][kSums / 4][128]
  uint32_t* flags;                                                 // [blocks][kConsumers]

  __device__ __forceinline__ int4* of_block(int block, int thread) const {
    return partials + int64_t{block * kConsumers + thread / kWarpgroup} * (kSums / 4) * kWarpgroup +
           thread % kWarpgroup;
  }

  __device__ __forceinline__ void contribute(const int (&acc)[Traits::kRowBlocks][Traits::kAcc]) const {
    const int thread = read_thread_index(), warpgroup = thread / kWarpgroup;
    int4* mine = of_block(static_cast<int>(blockIdx.x), thread);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const int* sums = acc[i * 4 / Traits::kAcc] + i * 4 % Traits::kAcc;
      __stcg(mine + i * kWarpgroup, make_int4(sums[0], sums[1], sums[2], sums[3]));
    }
    __threadfence();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
    if (thread % kWarpgroup == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flags + blockIdx.x * kConsumers + warpgroup)
                   : "memory");
    }
  }

  // Waits for what blocks first .. last - 1 contribute. Their flags are awaited side by side, a thread each:
  // one after the other they would cost a trip to L2 each.
  __device__ __forceinline__ void await(int first, int last) const {
    const int thread = read_thread_index(), warpgroup = thread / kWarpgroup;
#pragma unroll 1
    for (int block = first + thread % kWarpgroup; block < last; block += kWarpgroup) {
      uint32_t* flag = flags + block * kConsumers + warpgroup;
      uint32_t ready = 0;
      while (ready == 0) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
      }
      *flag = 0;  // as the next launch has to find it
    }
    __threadfence();
    named_barrier_sync(1 + warpgroup, kWarpgroup);
  }

  // Adds their sums of a row block.
  __device__ __forceinline__ void add(int first, int last, int row_block, int (&acc)[Traits::kAcc]) const {
    const int thread = read_thread_index();
    constexpr int kInFlight = kSums <= 8 ? 4 : 1;  // of the others' tiles, as registers allow
#pragma unroll kInFlight
    for (int block = first; block < last; ++block) {
      const int4* other = of_block(block, thread) + row_block * (Traits::kAcc / 4) * kWarpgroup;
#pragma unroll
      for (int i = 0; i < Traits::kAcc / 4; ++i) {
        const int4 v = __ldcg(other + i * kWarpgroup);
        acc[4 * i] += v.x;
        acc[4 * i + 1] += v.y;
        acc[4 * i + 2] += v.z;
        acc[4 * i + 3] += v.w;
      }
    }
  }
};

}  // namespace bitnet_ext::cuda
