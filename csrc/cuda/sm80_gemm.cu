// y = x * W^T for many tokens on int8 tensor cores: mma.sync m16n8k32, sm_80 and newer.
//
// A block computes kBlockN features x kBlockM tokens and walks along K in steps of kSlices x 128. The weights
// are the 16-row operand A: prepacked blocks (csrc/prepacked.h) are copied as they are, a lane reads its
// share of 16 features x 128 back as one 16-byte vector (int8: four), and every 2-bit word becomes a fragment
// by 4 masks and 3 shifts. The tokens are operand B: 128 bytes of each lie in shared memory in their natural
// order and ldmatrix deals them out. Both go through a ring of kStages buffers filled by cp.async.
//
// Small grids are bound by the latency of a block's walk along K, so the small tiles give each of kSlices
// groups of warps its own 128 of a step and add the groups' sums at the end: fewer, longer steps between
// barriers, with more bytes in flight. Large ones are bound by the tensor cores.
//
// int32 sums are exact and wrap, so no order of K can change a result.
#include <type_traits>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80_gemm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kPieces = kBlockCols / 16;  // 16-byte pieces of a token in a slice
constexpr int kVectorBytes = kLanes * 16;
constexpr int64_t kMaxGridY = 65535;  // and z

template <typename Weight_, int kBlockN_, int kBlockM_, int kWarpN_, int kWarpM_, int kSlices_>
struct GemmTraits {
  using Weight = Weight_;
  static constexpr int kBlockN = kBlockN_, kBlockM = kBlockM_;
  static constexpr int kWarpN = kWarpN_, kWarpM = kWarpM_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kWarpsN = kBlockN / kWarpN, kWarpsM = kBlockM / kWarpM;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM * kSlices;
  static constexpr int kTilesN = kWarpN / 16, kTilesM = kWarpM / 8;

  // A stage: x as [slice][token][128], then the weights as [row tile][slice][vector][lane].
  static constexpr int kBlockBytes = Weight::kVectors * kVectorBytes;
  static constexpr int kSliceBytesX = kBlockM * kBlockCols;
  static constexpr int kBytesX = kSlices * kSliceBytesX;
  static constexpr int kBytesW = kBlockN / kBlockRows * kSlices * kBlockBytes;
  static constexpr int kStageBytes = kBytesX + kBytesW;
  // Large tiles: two blocks fit in the 164 KB of sm_80. The others: one in the 99 KB of sm_86, sm_89, sm_120.
  static constexpr int kRingLimit = (kSlices == 1 ? 80 : 96) * 1024;
  static constexpr int kStages = kRingLimit / kStageBytes < 4 ? kRingLimit / kStageBytes : 4;

  // The sums of a slice as [token][feature]; these 4 words spread the columns of a fragment over the banks.
  static constexpr int kSumStride = kBlockN + 4;
  static constexpr int kSumBytes = kSlices * kBlockM * kSumStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages* kStageBytes : kSumBytes;

  // Large tiles: registers for 2 and 3 blocks of 128 threads on a multiprocessor. The largest takes up to
  // 255: its warps hold 64 x 64 sums, which halves unpacking and shared-memory reads against twice as many
  // warps of 64 x 32 (and those do not fit 128 registers).
  static constexpr int kMinBlocks = kSlices > 1 ? 1 : kBlockM == 128 ? 2 : 3;

  static_assert(kWarpN % 16 == 0 && kWarpM % 16 == 0, "a warp computes whole pairs of mma tiles");
  static_assert(kStages >= 2, "a stage is filled while another is read");
};

// One thread's share of filling a stage: the same piece of x in every kRowStep-th token, and the same vector
// of weights in every kTileStep-th row tile, for all slices. Tokens beyond M, row tiles beyond N and columns
// beyond K become zeros without being read.
template <typename Traits, bool kAligned>
struct StageLoader {
  static constexpr int kRowStep = Traits::kThreads / kPieces;
  static constexpr int kRowsX = Traits::kBlockM / kRowStep;  // of this thread, in each slice
  static constexpr int kUnitsX = kRowsX * Traits::kSlices;
  static constexpr int kVectorsPerSlice = kLanes * Traits::Weight::kVectors;
  static constexpr int kVectorsPerTile = kVectorsPerSlice * Traits::kSlices;
  static constexpr int kTileStep =
      Traits::kThreads > kVectorsPerTile ? Traits::kThreads / kVectorsPerTile : 1;
  static constexpr int kPartsW = kVectorsPerTile > Traits::kThreads ? kVectorsPerTile / Traits::kThreads : 1;
  static constexpr int kUnitsW = Traits::kBytesW / 16 / Traits::kThreads;
  static constexpr int kTilesW = kUnitsW / kPartsW;  // of this thread
  static_assert(kRowStep % kPieces == 0, "the swizzle is the same for all of a thread's tokens");
  static_assert(kRowsX * kRowStep == Traits::kBlockM && kRowsX <= 32, "whole passes over the tokens");
  static_assert(kTilesW * kPartsW == kUnitsW && kUnitsW * Traits::kThreads * 16 == Traits::kBytesW,
                "every thread copies the same number of vectors");
  static_assert(Traits::kThreads % kVectorsPerSlice == 0, "the parts of a row tile are whole slices apart");

  const int8_t* x;
  const uint8_t* weight;
  int stride_x, stride_weight;  // bytes between this thread's tokens, and between its row tiles
  int left_x, left_weight;      // bytes to the end of a token; blocks to the end of a row tile
  int tokens, tiles;  // from this thread's first one to the last of the matrix, or more than it copies
  int offset_x;

  __device__ __forceinline__ StageLoader(const ProductArgs& args, uint32_t tile_m, uint32_t tile_n) {
    const int64_t first_m = static_cast<int64_t>(tile_m) * Traits::kBlockM;
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    x = args.x_i8 + (first_m + row) * args.K + piece * 16;
    stride_x = kRowStep * static_cast<int>(args.K);
    left_x = static_cast<int>(args.K) - piece * 16;
    tokens = static_cast<int>(min(args.M - first_m - row, int64_t{Traits::kBlockM}));
    // Eight neighbouring tokens hold the same piece in eight different places, so that neither these writes
    // nor ldmatrix meet twice in a bank.
    offset_x = row * kBlockCols + ((piece ^ row % kPieces) << 4);

    const int vector = threadIdx.x % kVectorsPerTile;
    const int64_t tile =
        static_cast<int64_t>(tile_n) * (Traits::kBlockN / kBlockRows) + threadIdx.x / kVectorsPerTile;
    const int64_t tile_bytes = block_cols(args.K) * Traits::kBlockBytes;
    weight = static_cast<const uint8_t*>(args.weight) + tile * tile_bytes + vector * 16;
    stride_weight = kTileStep * static_cast<int>(tile_bytes);
    left_weight = static_cast<int>(block_cols(args.K)) - vector / kVectorsPerSlice;
    tiles = static_cast<int>(min(block_rows(args.N) - tile, int64_t{Traits::kBlockN}));
  }

  // Copies the next step's weights.
  __device__ __forceinline__ void fill_weights(uint8_t* stage) {
    uint8_t* target = stage + Traits::kBytesX + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kUnitsW; ++i) {
      const int tile = i / kPartsW, part = i % kPartsW;
      const bool exists =
          tile * kTileStep < tiles &&
          (Traits::kSlices == 1 || part * (Traits::kThreads / kVectorsPerSlice) < left_weight);
      cp_async_16(target + i * Traits::kThreads * 16,
                  weight + static_cast<int64_t>(tile) * stride_weight + part * Traits::kThreads * 16,
                  exists);
    }
    weight += Traits::kSlices * Traits::kBlockBytes;
    left_weight -= Traits::kSlices;
  }

  // Copies the next step's x.
  __device__ __forceinline__ void fill_x(uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < kUnitsX; ++i) {
      const int slice = i / kRowsX, pass = i % kRowsX;
      const int valid = pass * kRowStep < tokens ? left_x - slice * kBlockCols : 0;
      const int8_t* source = x + static_cast<int64_t>(pass) * stride_x + slice * kBlockCols;
      uint8_t* target = stage + slice * Traits::kSliceBytesX + offset_x + pass * kRowStep * kBlockCols;
      if constexpr (kAligned) {
        cp_async_16(target, source, valid > 0);
      } else {
        *reinterpret_cast<uint4*>(target) = load_bytes_16(source, valid);
      }
    }
    x += Traits::kSlices * kBlockCols;
    left_x -= Traits::kSlices * kBlockCols;
  }
};

template <typename Traits>
struct WarpProduct {
  using Weight = typename Traits::Weight;

  int acc[Traits::kTilesN][Traits::kTilesM][4] = {};
  uint4 vectors[Traits::kTilesN][Weight::kVectors];

  // One of the four steps of 32 along a slice. `x` and `weight` are the offsets at which this lane reads its
  // slice in the ring.
  template <int kStep>
  __device__ __forceinline__ void step(const uint8_t* ring, int x, int weight) {
    // The swizzle only flips bits of the piece's number, so going on by two pieces is one more flip.
    uint32_t b[Traits::kTilesM / 2][4];
#pragma unroll
    for (int j = 0; j < Traits::kTilesM / 2; ++j) {
      ldmatrix_x4(b[j], ring + (x ^ kStep * 32) + j * 16 * kBlockCols);
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesN; ++i) {
      if constexpr (kStep < Weight::kVectors) {
        vectors[i][kStep] = *reinterpret_cast<const uint4*>(
            ring + weight + i * Traits::kSlices * Traits::kBlockBytes + kStep * kVectorBytes);
      }
      uint32_t a[4];
      Weight::fragment(vectors[i], kStep, a);
#pragma unroll
      for (int j = 0; j < Traits::kTilesM; ++j) {
        mma_m16n8k32_s8(acc[i][j], a[0], a[1], a[2], a[3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
};

// Writes the block's sums, in shared memory, to out: 16 bytes a thread and access where rows allow it.
template <typename Traits, typename out_t>
__device__ __forceinline__ void write_tile(const ProductArgs& args,
                                           const int* sums,
                                           int64_t first_m,
                                           int64_t first_n) {
  constexpr int kRun = 16 / static_cast<int>(sizeof(out_t));
  constexpr int kRunsPerRow = Traits::kBlockN / kRun;
  const int column = threadIdx.x % kRunsPerRow * kRun;
  const int64_t n = first_n + column;
  if (n >= args.N) return;
  ColumnFactors factors[kRun] = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (n + i < args.N) factors[i] = column_factors(args, n + i);
  }
  const bool aligned = args.N % kRun == 0 && is_aligned(args.out, 16);
  for (int row = threadIdx.x / kRunsPerRow; row < Traits::kBlockM; row += Traits::kThreads / kRunsPerRow) {
    const int64_t m = first_m + row;
    if (m >= args.M) return;
    int sum[kRun] = {};
#pragma unroll
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
#pragma unroll
      for (int part = 0; part < kRun / 4; ++part) {
        const int4 v = *reinterpret_cast<const int4*>(
            sums + (slice * Traits::kBlockM + row) * Traits::kSumStride + column + part * 4);
        sum[part * 4 + 0] += v.x;
        sum[part * 4 + 1] += v.y;
        sum[part * 4 + 2] += v.z;
        sum[part * 4 + 3] += v.w;
      }
    }
    const float act_scale = args.raw ? 1.0f : args.act_scale[m];
    alignas(16) out_t values[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if constexpr (std::is_same_v<out_t, int>) {
        values[i] = sum[i];
      } else {
        values[i] = from_float<out_t>(scaled_output(args, sum[i], act_scale, factors[i]));
      }
    }
    out_t* out = static_cast<out_t*>(args.out) + m * args.N + n;
    if (aligned) {
      // Written so, because the compiler takes a plain assignment here apart into four stores
      __stwb(reinterpret_cast<int4*>(out), *reinterpret_cast<const int4*>(values));
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (n + i < args.N) out[i] = values[i];
      }
    }
  }
}

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    sm80_gemm_kernel(const __grid_constant__ ProductArgs args) {
  constexpr int kStages = Traits::kStages;
  extern __shared__ __align__(128) uint8_t ring[];

  // A group of gridDim.x token tiles meets all features before the next group begins: blocks that run at the
  // same time share their x and their weights in L2.
  const uint32_t tile_m = blockIdx.z * gridDim.x + blockIdx.x, tile_n = blockIdx.y;
  if (static_cast<int64_t>(tile_m) * Traits::kBlockM >= args.M) return;  // the last group may be short

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Traits::kWarpsM * Traits::kWarpM;
  const int warp_n = warp / Traits::kWarpsM % Traits::kWarpsN * Traits::kWarpN;
  const int slice = warp / (Traits::kWarpsM * Traits::kWarpsN);
  const int blocks_k = static_cast<int>(block_cols(args.K));
  int steps = (blocks_k + Traits::kSlices - 1) / Traits::kSlices;

  // Fill all but one stage
  StageLoader<Traits, kAligned> loader(args, tile_m, tile_n);
  if (!args.weight_is_constant) wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.fill_weights(ring + s * Traits::kStageBytes);
  }
  if (args.weight_is_constant) wait_for_previous_kernel();
  allow_next_kernel();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.fill_x(ring + s * Traits::kStageBytes);
    cp_async_commit();  // the first group holds the weights of all these stages
  }

  // ldmatrix reads 16 tokens x 2 pieces: lanes 0-7 and 8-15 address the pieces of tokens 0-7, lanes 16-31
  // those of tokens 8-15.
  const int row_x = warp_m + lane / 16 * 8 + lane % 8;
  const int offset_x =
      slice * Traits::kSliceBytesX + row_x * kBlockCols + ((lane / 8 % 2 ^ row_x % kPieces) << 4);
  const int offset_w =
      Traits::kBytesX + (warp_n / kBlockRows * Traits::kSlices + slice) * Traits::kBlockBytes + lane * 16;

  WarpProduct<Traits> product;
  int read_stage = 0;
  for (int left = blocks_k - slice; steps > 0; left -= Traits::kSlices, --steps) {
    // The barrier publishes this stage, and says that all warps are done with the one before, which is filled
    // next
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (steps > kStages - 1) {
      uint8_t* stage = ring + (read_stage == 0 ? kStages - 1 : read_stage - 1) * Traits::kStageBytes;
      loader.fill_weights(stage);
      loader.fill_x(stage);
    }
    cp_async_commit();  // an empty group at the end keeps the count of pending groups right

    if (Traits::kSlices == 1 || left > 0) {
      const int x = read_stage * Traits::kStageBytes + offset_x;
      const int weight = read_stage * Traits::kStageBytes + offset_w;
      product.template step<0>(ring, x, weight);
      product.template step<1>(ring, x, weight);
      product.template step<2>(ring, x, weight);
      product.template step<3>(ring, x, weight);
    }
    if (++read_stage == kStages) read_stage = 0;
  }

  // Transpose through shared memory: a lane holds 2 neighbouring tokens of a feature, out has features inside
  __syncthreads();
  int* sums = reinterpret_cast<int*>(ring);
  int* corner =
      sums + (slice * Traits::kBlockM + warp_m + lane % 4 * 2) * Traits::kSumStride + warp_n + lane / 4;
#pragma unroll
  for (int i = 0; i < Traits::kTilesN; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kTilesM; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        corner[(j * 8 + c % 2) * Traits::kSumStride + i * 16 + c / 2 * 8] =
            product.acc[i][j][c] >> Traits::Weight::kShift;
      }
    }
  }
  __syncthreads();
  const int64_t first_m = static_cast<int64_t>(tile_m) * Traits::kBlockM;
  const int64_t first_n = static_cast<int64_t>(tile_n) * Traits::kBlockN;
  if (args.raw) {
    write_tile<Traits, int>(args, sums, first_m, first_n);
  } else if (args.out_dtype == DType::kBFloat16) {
    write_tile<Traits, __nv_bfloat16>(args, sums, first_m, first_n);
  } else if (args.out_dtype == DType::kFloat16) {
    write_tile<Traits, __half>(args, sums, first_m, first_n);
  } else {
    write_tile<Traits, float>(args, sums, first_m, first_n);
  }
}

template <typename Traits, bool kAligned>
cudaError_t launch(const ProductArgs& args, int num_sms, cudaStream_t stream) {
  const int64_t blocks_m = ceil_div(args.M, Traits::kBlockM);
  const int64_t blocks_n = ceil_div(args.N, Traits::kBlockN);
  // Groups of the side of the square of the blocks that run at the same time, two a multiprocessor, evened
  // out so that few places are empty
  int64_t group = 1;
  while (group < blocks_m && group * group < 2 * num_sms) ++group;
  const int64_t num_groups = ceil_div(blocks_m, group);
  group = ceil_div(blocks_m, num_groups);
  if (blocks_n > kMaxGridY || num_groups > kMaxGridY) return cudaErrorInvalidConfiguration;
  const dim3 grid(
      static_cast<unsigned>(group), static_cast<unsigned>(blocks_n), static_cast<unsigned>(num_groups));

  const auto kernel = sm80_gemm_kernel<Traits, kAligned>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(
      kernel, grid, Traits::kThreads, Traits::kSharedBytes, stream, args.dependent_launch, args);
}

// A fragment of tokens serves 2 or 4 row tiles, a fragment of weights 4 or 8 token tiles.
template <typename Weight>
cudaError_t launch_tile(const ProductArgs& args, GemmTile tile, int num_sms, cudaStream_t stream) {
  using Tile64x64 = GemmTraits<Weight, 64, 64, 32, 32, 2>;
  using Tile32x32 = GemmTraits<Weight, 32, 32, 32, 32, 4>;
  if (args.K % 16 != 0 || reinterpret_cast<uintptr_t>(args.x_i8) % 16 != 0) {
    // Loads of single bytes decide the time, not the tile
    return tile_tokens(tile) == 32 ? launch<Tile32x32, false>(args, num_sms, stream)
                                   : launch<Tile64x64, false>(args, num_sms, stream);
  }
  switch (tile) {
    case GemmTile::k128x128:
      return launch<GemmTraits<Weight, 128, 128, 64, 64, 1>, true>(args, num_sms, stream);
    case GemmTile::k128x64:
      return launch<GemmTraits<Weight, 128, 64, 64, 32, 1>, true>(args, num_sms, stream);
    case GemmTile::k64x64:
      return launch<Tile64x64, true>(args, num_sms, stream);
    case GemmTile::k64x32:
      return launch<GemmTraits<Weight, 64, 32, 32, 32, 4>, true>(args, num_sms, stream);
    case GemmTile::k32x32:
      break;
  }
  return launch<Tile32x32, true>(args, num_sms, stream);
}

}  // namespace

cudaError_t launch_sm80_gemm(const ProductArgs& args, GemmTile tile, int num_sms, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return cudaSuccess;
  if (ceil_div(args.N, tile_features(tile)) > kMaxGridY) tile = GemmTile::k128x64;
  return is_ternary(args) ? launch_tile<TernaryWeight>(args, tile, num_sms, stream)
                          : launch_tile<Int8Weight>(args, tile, num_sms, stream);
}

}  // namespace bitnet_ext::cuda
