// y = x * W^T for M > 8 on int8 tensor cores: mma.sync m16n8k32, sm_80 and newer.
//
// A block computes a tile of kBlockM tokens x kBlockN features and steps through K by 128. A ring of kStages
// shared-memory buffers is filled by cp.async: 128 bytes a token and 32 packed bytes a feature. The weights
// stay packed until they are in registers, where one 32-bit word becomes the B fragments of two mma by 4
// masks and 3 shifts. That fixes the order of K inside a 16-byte piece (common/planes.cuh); the activations
// get the same order by a 4 x 4 byte transposition in shared memory, done by the thread that copied the
// piece, before the barrier that publishes it. The sum of x over a row, which undoes the +1 of the stored
// codes, comes out of the same step.
//
// Fragments, with g = lane / 4 and t = lane % 4: word t of a weight row's 16 bytes has k = 16t .. 16t + 15 of
// the 64; its plane r, byte j, is k = 16t + 4j + r. Planes 0, 1 are (b0, b1) of the first mma, planes 2, 3 of
// the second; so (a0, a2) of token g are words 0, 1 and 2, 3 of the transposed piece t, and (a1, a3) those of
// token g + 8. A whole piece is one 16-byte shared-memory read.
//
// Bound: tensor cores for large M; for small problems the latency of one block's walk along K, which the ring
// hides. int32 sums are exact and wrap, so no order of K can change a result.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/planes.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/heuristics.h"
#include "cuda/int8xint2.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "packing.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kBlockK = 128;
constexpr int kPiecesX = kBlockK / 16;  // 16-byte pieces of a token's row in a stage
constexpr int kPiecesW = kBlockK / 64;  // and of a feature's

template <int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_, int kStages_>
struct GemmTraits {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr int kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpsM = kBlockM / kWarpM, kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBytesX = kBlockM * kBlockK;
  static constexpr int kBytesW = kBlockN * kBlockK / kCodesPerByte;
  static constexpr int kStageBytes = kBytesX + kBytesW;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kUnitsX = kBlockM * kPiecesX / kThreads;  // pieces a thread copies
  static constexpr int kUnitsW = (kBlockN * kPiecesW + kThreads - 1) / kThreads;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 8 == 0, "a warp computes whole mma tiles");
  static_assert(kBlockM * kPiecesX % kThreads == 0, "every thread copies the same number of pieces of x");
  static_assert(kThreads % kPiecesX == 0, "the pieces of a row are copied by neighbouring lanes");
};

// Byte offsets of a piece in a stage. Rows are 128 and 32 bytes; the swizzles put the eight 16-byte reads (x)
// and the 32 word reads (weights) of a fragment load into different banks.
__device__ __forceinline__ int offset_x(int row, int piece) {
  return row * kBlockK + ((piece ^ (row & 1) << 2) << 4);
}
__device__ __forceinline__ int offset_w(int row, int piece) {
  return row * (kBlockK / kCodesPerByte) + ((piece ^ (row >> 2 & 1)) << 4);
}

// One thread's share of filling a stage: the same piece of every kRowStep-th row. Rows beyond M or N and
// pieces beyond K become zeros, which makes whatever the other operand holds there harmless.
template <typename Traits, bool kAligned>
struct StageLoader {
  static constexpr int kRowStepX = Traits::kThreads / kPiecesX;
  static constexpr int kRowStepW = Traits::kThreads / kPiecesW;
  static_assert(kRowStepX % 2 == 0 && kRowStepW % 8 == 0,
                "the swizzle is the same for all of a thread's rows");

  const int8_t* x;
  const uint8_t* packed;
  int64_t stride_x, stride_packed;  // bytes between this thread's rows
  int left_x, left_packed;          // bytes from this thread's piece to the end of a row
  unsigned rows_x, rows_packed;     // bit i: row i of this thread exists
  int offset_x_piece, offset_packed_piece;
  bool x_aligned, packed_aligned;  // read only when !kAligned

  __device__ __forceinline__ StageLoader(
      const Int8xInt2Args& args, int64_t first_m, int64_t first_n, bool x_is_aligned, bool packed_is_aligned)
      : x_aligned(x_is_aligned), packed_aligned(packed_is_aligned) {
    const int row_x = threadIdx.x / kPiecesX, piece_x = threadIdx.x % kPiecesX;
    const int row_w = threadIdx.x / kPiecesW, piece_w = threadIdx.x % kPiecesW;
    const int64_t row_bytes = packed_bytes(args.K);
    x = args.x_i8 + (first_m + row_x) * args.K + piece_x * 16;
    packed = args.packed + (first_n + row_w) * row_bytes + piece_w * 16;
    stride_x = kRowStepX * args.K;
    stride_packed = kRowStepW * row_bytes;
    left_x = static_cast<int>(args.K) - piece_x * 16;
    left_packed = static_cast<int>(row_bytes) - piece_w * 16;
    rows_x = rows_packed = 0;
#pragma unroll
    for (int i = 0; i < Traits::kUnitsX; ++i) {
      if (first_m + row_x + i * kRowStepX < args.M) rows_x |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < Traits::kUnitsW; ++i) {
      if (first_n + row_w + i * kRowStepW < args.N) rows_packed |= 1u << i;
    }
    offset_x_piece = offset_x(row_x, piece_x);
    offset_packed_piece = Traits::kBytesX + offset_w(row_w, piece_w);
  }

  // Where this thread puts its piece of row i.
  __device__ __forceinline__ uint8_t* piece_of_x(uint8_t* stage, int i) const {
    return stage + offset_x_piece + i * kRowStepX * kBlockK;
  }

  // Copies the next kBlockK of K.
  __device__ __forceinline__ void fill(uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < Traits::kUnitsX; ++i) {
      const int valid = rows_x >> i & 1 ? left_x : 0;
      const int8_t* source = x + i * stride_x;
      uint8_t* target = piece_of_x(stage, i);
      if (kAligned || x_aligned) {
        cp_async_16(target, source, valid > 0);
      } else {
        *reinterpret_cast<uint4*>(target) = load_bytes_16(source, valid);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kUnitsW; ++i) {
      if (threadIdx.x + i * Traits::kThreads >= Traits::kBlockN * kPiecesW) break;
      const int valid = rows_packed >> i & 1 ? left_packed : 0;
      const uint8_t* source = packed + i * stride_packed;
      uint8_t* target = stage + offset_packed_piece + i * kRowStepW * (kBlockK / kCodesPerByte);
      if (kAligned || packed_aligned) {
        cp_async_16(target, source, valid > 0);
      } else {
        *reinterpret_cast<uint4*>(target) = load_bytes_16(source, valid);
      }
    }
    x += kBlockK;
    packed += kBlockK / kCodesPerByte;
    left_x -= kBlockK;
    left_packed -= kBlockK / kCodesPerByte;
  }
};

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kThreads) sm80_int8xint2_gemm_kernel(
    const __grid_constant__ Int8xInt2Args args, bool x_aligned, bool packed_aligned, uint32_t blocks_m) {
  constexpr int kStages = Traits::kStages;
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ int x_sums[Traits::kBlockM];

  // Neighbouring blocks share the weights: tokens run fastest.
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % blocks_m) * Traits::kBlockM;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / blocks_m) * Traits::kBlockN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_m = warp % Traits::kWarpsM * Traits::kWarpM;
  const int warp_n = warp / Traits::kWarpsM * Traits::kWarpN;
  const int steps = static_cast<int>(ceil_div(args.K, kBlockK));

  // Fill all but one stage
  StageLoader<Traits, kAligned> loader(args, first_m, first_n, x_aligned, packed_aligned);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.fill(ring + s * Traits::kStageBytes);
    cp_async_commit();
  }

  // A row further by 8 or 16 has the same swizzle, and the other half of a stage is the same offset with one
  // bit flipped.
  const int fragment_offset_x = offset_x(warp_m + g, t);
  const int fragment_offset_w = offset_w(warp_n + g, 0) + t * 4;

  int acc[Traits::kTilesM][Traits::kTilesN][4] = {};
  int x_sum[Traits::kUnitsX] = {};
  int read_stage = 0, fill_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    // Transpose this thread's own pieces; nobody else reads them before the barrier
    cp_async_wait<kStages - 2>();
    uint8_t* stage = ring + read_stage * Traits::kStageBytes;
#pragma unroll
    for (int i = 0; i < Traits::kUnitsX; ++i) {
      uint4* piece = reinterpret_cast<uint4*>(loader.piece_of_x(stage, i));
      const uint4 x = *piece;
      x_sum[i] = add_bytes(x, x_sum[i]);
      *piece = activation_planes(x);
    }
    // Publishes this stage, and says that all warps are done with the one before, which is filled next
    __syncthreads();
    if (step + kStages - 1 < steps) loader.fill(ring + fill_stage * Traits::kStageBytes);
    cp_async_commit();  // an empty group at the end keeps the count of pending groups right

    // Multiply
#pragma unroll
    for (int half = 0; half < kPiecesW; ++half) {
      uint4 x[Traits::kTilesM][2];
      const uint8_t* fragment_x = stage + (fragment_offset_x ^ half * 64);
#pragma unroll
      for (int i = 0; i < Traits::kTilesM; ++i) {
        x[i][0] = *reinterpret_cast<const uint4*>(fragment_x + i * 16 * kBlockK);
        x[i][1] = *reinterpret_cast<const uint4*>(fragment_x + (i * 16 + 8) * kBlockK);
      }
      const uint8_t* fragment_w = stage + Traits::kBytesX + (fragment_offset_w ^ half * 16);
#pragma unroll
      for (int j = 0; j < Traits::kTilesN; ++j) {
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(fragment_w + j * 8 * (kBlockK / kCodesPerByte));
        const uint32_t w0 = weight_plane<0>(word), w1 = weight_plane<1>(word);
        const uint32_t w2 = weight_plane<2>(word), w3 = weight_plane<3>(word);
#pragma unroll
        for (int i = 0; i < Traits::kTilesM; ++i) {
          mma_m16n8k32_s8(acc[i][j], x[i][0].x, x[i][1].x, x[i][0].y, x[i][1].y, w0, w1);
          mma_m16n8k32_s8(acc[i][j], x[i][0].z, x[i][1].z, x[i][0].w, x[i][1].w, w2, w3);
        }
      }
    }
    read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
    fill_stage = fill_stage + 1 == kStages ? 0 : fill_stage + 1;
  }

  // Sums of x: the kPiecesX lanes that copied a row add theirs
#pragma unroll
  for (int i = 0; i < Traits::kUnitsX; ++i) {
    int sum = x_sum[i];
#pragma unroll
    for (int offset = kPiecesX / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    const int unit = threadIdx.x + i * Traits::kThreads;
    if (unit % kPiecesX == 0) x_sums[unit / kPiecesX] = sum;
  }
  __syncthreads();

  // Scale and write
#pragma unroll
  for (int j = 0; j < Traits::kTilesN; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t n = first_n + warp_n + j * 8 + t * 2 + c;
      if (n >= args.N) continue;
      const ColumnFactors factors = column_factors(args, n);
#pragma unroll
      for (int i = 0; i < Traits::kTilesM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_m + i * 16 + half * 8 + g;
          const int64_t m = first_m + row;
          if (m >= args.M) continue;
          const float act_scale = args.raw ? 1.0f : args.act_scale[m];
          store_output(args, m, n, acc[i][j][half * 2 + c] - x_sums[row], act_scale, factors);
        }
      }
    }
  }
}

template <typename Traits, bool kAligned>
cudaError_t launch(const Int8xInt2Args& args, bool x_aligned, bool packed_aligned, cudaStream_t stream) {
  const int64_t blocks_m = ceil_div(args.M, Traits::kBlockM);
  const int64_t blocks = blocks_m * ceil_div(args.N, Traits::kBlockN);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = sm80_int8xint2_gemm_kernel<Traits, kAligned>;
  if constexpr (Traits::kSharedBytes > 47 * 1024) {  // 48 KB without asking, x_sums included
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(
      args, x_aligned, packed_aligned, static_cast<uint32_t>(blocks_m));
  return cudaGetLastError();
}

// Warp tiles are wide in features: packed weights cost a quarter of the shared-memory reads of activations.
using LargeTraits = GemmTraits<128, 128, 32, 64, 3>;
using MediumTraits = GemmTraits<64, 64, 32, 32, 4>;
using SmallTraits = GemmTraits<32, 32, 16, 16, 6>;

}  // namespace

cudaError_t launch_sm80_int8xint2_gemm(const Int8xInt2Args& args, int num_sms, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  const bool x_aligned = args.K % 16 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 16 == 0;
  const bool packed_aligned =
      packed_bytes(args.K) % 16 == 0 && reinterpret_cast<uintptr_t>(args.packed) % 16 == 0;
  const GemmTile tile = gemm_tile(args.M, args.N, num_sms);
  if (!x_aligned || !packed_aligned) {
    // Single-byte loads decide the time, not the tile.
    return tile == GemmTile::k32x32 ? launch<SmallTraits, false>(args, x_aligned, packed_aligned, stream)
                                    : launch<MediumTraits, false>(args, x_aligned, packed_aligned, stream);
  }
  switch (tile) {
    case GemmTile::k128x128:
      return launch<LargeTraits, true>(args, true, true, stream);
    case GemmTile::k64x64:
      return launch<MediumTraits, true>(args, true, true, stream);
    case GemmTile::k32x32:
      break;
  }
  return launch<SmallTraits, true>(args, true, true, stream);
}

}  // namespace bitnet_ext::cuda
