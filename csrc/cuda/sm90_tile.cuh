// A tile of sm90_gemm.cu: its sizes, how the sums of a tile that several blocks share come together, and the
// way from sums to memory.
#pragma once

#include "cuda/common/epilogue.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/common/work_split.cuh"
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

}  // namespace bitnet_ext::cuda
