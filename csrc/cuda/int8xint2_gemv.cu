// y = x * W^T for few tokens (M <= 8): every packed weight is read once, and that is the bound.
//
// A warp computes kRows output features for all M tokens. Its lanes split K: a lane loads 16 bytes of a row,
// 64 weights, so a warp reads 512 contiguous bytes an instruction and covers 2,048 weights. The activations
// of a slab of 4,096 k are staged in shared memory by the whole block, already in the order of the weight
// planes (common/planes.cuh), and are read by all rows. The loads of the weights are issued before the
// staging, so that the latency of both overlaps.
//
// dp4a works on the stored codes t + 1; the sum of x, taken while staging, is subtracted at the end. All sums
// are int32 and exact, whatever their order.
//
// Packed rows of ceil(K / 4) bytes have any alignment: when they are not all multiples of 16 bytes, a variant
// assembles the words from single bytes.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/planes.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/heuristics.h"
#include "cuda/int8xint2.h"
#include "cuda/ptx/ld_global.cuh"
#include "packing.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kSlab = kThreads * 16;     // k staged at a time: 16 a thread
constexpr int kChunk = 32 * 64;          // k a warp covers with one 16-byte load a lane
constexpr int kChunks = kSlab / kChunk;  // of a slab
constexpr int kWordsPerChunk = kChunk / 16;

// Where word `word` of the slab keeps its activations. A lane owns 4 neighbouring words and reads one an
// instruction; with word q of all lanes side by side, the 16-byte reads of a warp are conflict-free.
__device__ __forceinline__ int plane_slot(int word) {
  const int in_chunk = word % kWordsPerChunk;
  return word / kWordsPerChunk * kWordsPerChunk + in_chunk % 4 * 32 + in_chunk / 4;
}

template <int kM, int kRows, bool kPackedAligned>
__global__ void __launch_bounds__(kThreads, 2)
    int8xint2_gemv_kernel(const __grid_constant__ Int8xInt2Args args, bool x_aligned) {
  static_assert(kM * kRows <= 32, "one lane writes one output");
  __shared__ uint4 x_planes[kM][kSlab / 16];
  __shared__ int x_sums[kM][kWarps];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const int64_t row_bytes = packed_bytes(args.K);

  int acc[kRows][kM] = {};
  int x_sum[kM] = {};
  for (int64_t slab = 0; slab < args.K; slab += kSlab) {
    // Issue the loads of the weights
    uint4 weights[kRows][kChunks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool row_exists = first_row + r < args.N;
      const uint8_t* row = args.packed + (row_exists ? first_row + r : 0) * row_bytes;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int64_t offset = (slab + chunk * kChunk) / kCodesPerByte + lane * 16;
        const int64_t valid = row_exists ? row_bytes - offset : 0;
        if constexpr (kPackedAligned) {
          weights[r][chunk] = valid >= 16 ? load_once_16(row + offset) : make_uint4(0, 0, 0, 0);
        } else {
          weights[r][chunk] = load_bytes_16(row + offset, valid);
        }
      }
    }

    // Stage the activations; zeros beyond M and K make whatever the weights hold there harmless
    if (slab > 0) __syncthreads();  // every warp has read the slab before
    const int64_t k = slab + threadIdx.x * 16;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int64_t valid = m < args.M ? args.K - k : 0;
      const int8_t* address = args.x_i8 + (m < args.M ? m : 0) * args.K + k;
      uint4 x;
      if (x_aligned) {
        x = valid >= 16 ? *reinterpret_cast<const uint4*>(address) : make_uint4(0, 0, 0, 0);
      } else {
        x = load_bytes_16(address, valid);
      }
      x_sum[m] = add_bytes(x, x_sum[m]);
      x_planes[m][plane_slot(threadIdx.x)] = activation_planes(x);
    }
    __syncthreads();

    // Multiply
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (slab + chunk * kChunk >= args.K) break;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t planes[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint4& w = weights[r][chunk];
          const uint32_t word = q == 0 ? w.x : q == 1 ? w.y : q == 2 ? w.z : w.w;
          planes[r][0] = weight_plane<0>(word);
          planes[r][1] = weight_plane<1>(word);
          planes[r][2] = weight_plane<2>(word);
          planes[r][3] = weight_plane<3>(word);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const uint4 xs = x_planes[m][chunk * kWordsPerChunk + q * 32 + lane];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            int sum = acc[r][m];
            sum = __dp4a(static_cast<int>(planes[r][0]), static_cast<int>(xs.x), sum);
            sum = __dp4a(static_cast<int>(planes[r][1]), static_cast<int>(xs.y), sum);
            sum = __dp4a(static_cast<int>(planes[r][2]), static_cast<int>(xs.z), sum);
            acc[r][m] = __dp4a(static_cast<int>(planes[r][3]), static_cast<int>(xs.w), sum);
          }
        }
      }
    }
  }

  // Sum over the lanes; lane r * kM + m keeps the sum of output (m, first_row + r)
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int sum = __reduce_add_sync(kFullWarp, x_sum[m]);
    if (lane == 0) x_sums[m][warp] = sum;
  }
  int mine = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int sum = __reduce_add_sync(kFullWarp, acc[r][m]);
      if (lane == r * kM + m) mine = sum;
    }
  }
  __syncthreads();

  const int m = lane % kM;
  const int64_t n = first_row + lane / kM;
  if (lane < kRows * kM && m < args.M && n < args.N) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) mine -= x_sums[m][w];
    const float act_scale = args.raw ? 1.0f : args.act_scale[m];
    store_output(args, m, n, mine, act_scale, column_factors(args, n));
  }
}

template <int kM, int kRows, bool kPackedAligned>
cudaError_t launch(const Int8xInt2Args& args, bool x_aligned, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.N, kWarps * kRows);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  int8xint2_gemv_kernel<kM, kRows, kPackedAligned>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, x_aligned);
  return cudaGetLastError();
}

template <int kM>
cudaError_t launch_rows(const Int8xInt2Args& args, int num_sms, cudaStream_t stream) {
  const bool x_aligned = args.K % 16 == 0 && reinterpret_cast<uintptr_t>(args.x_i8) % 16 == 0;
  const bool packed_aligned =
      packed_bytes(args.K) % 16 == 0 && reinterpret_cast<uintptr_t>(args.packed) % 16 == 0;
  if (!packed_aligned) return launch<kM, 1, false>(args, x_aligned, stream);
  if (gemv_rows_per_warp(args.N, num_sms) == 4) return launch<kM, 4, true>(args, x_aligned, stream);
  return launch<kM, 1, true>(args, x_aligned, stream);
}

}  // namespace

cudaError_t launch_int8xint2_gemv(const Int8xInt2Args& args, int num_sms, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (args.M > kGemvMaxM) return cudaErrorInvalidValue;
  if (args.M == 1) return launch_rows<1>(args, num_sms, stream);
  if (args.M == 2) return launch_rows<2>(args, num_sms, stream);
  if (args.M <= 4) return launch_rows<4>(args, num_sms, stream);
  return launch_rows<8>(args, num_sms, stream);
}

}  // namespace bitnet_ext::cuda
