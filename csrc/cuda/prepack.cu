// Conversions into and out of the prepacked layout of csrc/prepacked.h: one pass over memory each, bound by
// its bandwidth.
//
// Ternary, both ways: a warp moves one block of 16 rows x 128 columns. On the canonical side lane 4 g + s has
// 32 columns, step s, of the rows g and g + 8: 8 bytes each, so that four lanes cover a sector of 32 bytes
// and the eight warps of a thread block, which are neighbours along K, 256 bytes of a row. On the prepacked
// side a lane has its vector and a warp 512 bytes in a row. Nothing goes through shared memory; between the
// two lie three transposes of 4 x 4:
//     bytes    within a lane: byte t of the 4 registers of a step, for each t;
//     pairs    within a word: register j and byte i of the layout are byte and pair of the canonical form;
//     words    between the four lanes of a quad, by shuffles: lane t gets word s from lane s.
//
// int8: a warp makes one block. Every register of a fragment is 4 bytes in a row of the matrix, so lanes load
// registers (8 rows x 16 bytes an instruction; the other half of the sector comes from L1) and store vectors.
//
// Dequantisation: a warp writes 512 bytes of row g and then of row g + 8, whose codes lie in the same words,
// in stores of 16 bytes a lane. The prepacked words are a sixteenth (fp32) or an eighth of that, read in
// segments of one block each, which L1 merges: the write of `out` is all that counts.
//
// Kernels that write prepacked weights end with __threadfence(): a product that is launched as a dependent
// kernel may read the weights before it waits for its predecessor, that is, as soon as the blocks of this
// kernel have ended. For the same reason they never call allow_next_kernel.
#include <type_traits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/prepack.h"
#include "packing.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kColsPerLane = kBlockCols / 4;
constexpr uint32_t kLowBits = 0x55555555u;  // of each of 16 pairs

// Blocks of the layout, numbered in the order in which they lie in memory.
struct BlockGrid {
  uint32_t wide;   // blocks along K
  uint32_t count;  // 0 when the matrix is too large for one grid

  __device__ __forceinline__ int64_t first_row(uint32_t block) const {
    return static_cast<int64_t>(block / wide) * kBlockRows;
  }
  __device__ __forceinline__ int64_t first_col(uint32_t block) const {
    return static_cast<int64_t>(block % wide) * kBlockCols;
  }
};

BlockGrid make_block_grid(int64_t N, int64_t K) {
  const int64_t wide = block_cols(K);
  const int64_t count = block_rows(N) * wide;
  if (count > INT32_MAX) return {1, 0};
  return {static_cast<uint32_t>(wide), static_cast<uint32_t>(count)};
}

unsigned warp_grid(const BlockGrid& grid) {
  return (grid.count + kWarps - 1) / kWarps;
}

// --- pairs of bits
// ------------------------------------------------------------------------------------------

// 16 stored values (code + 1) -> 16 codes in two's complement: 0, 1, 2 -> 11, 00, 01, and 3 -> 01.
__device__ __forceinline__ uint32_t signed_from_stored(uint32_t stored) {
  const uint32_t low = stored & kLowBits, high = stored >> 1 & kLowBits;
  return ((high | ~low) & kLowBits) | (~(high | low) & kLowBits) << 1;
}

__device__ __forceinline__ uint32_t stored_from_signed(uint32_t codes) {
  const uint32_t low = codes & kLowBits, high = codes >> 1 & kLowBits;
  return (~low & kLowBits) | (high ^ low) << 1;
}

// Keeps the first `valid` of 16 codes and clears the others, which makes them 0.
__device__ __forceinline__ uint32_t keep_codes(uint32_t codes, int64_t valid) {
  if (valid >= 16) return codes;
  return valid <= 0 ? 0 : codes & ((1u << (2 * static_cast<int>(valid))) - 1);
}

// --- transposes of 4 x 4, each its own inverse
// --------------------------------------------------------------

// Byte j of word r <-> byte r of word j.
__device__ __forceinline__ void transpose_bytes(uint32_t (&m)[4]) {
  const uint32_t low_01 = __byte_perm(m[0], m[1], 0x5140), low_23 = __byte_perm(m[2], m[3], 0x5140);
  const uint32_t high_01 = __byte_perm(m[0], m[1], 0x7362), high_23 = __byte_perm(m[2], m[3], 0x7362);
  m[0] = __byte_perm(low_01, low_23, 0x5410);
  m[1] = __byte_perm(low_01, low_23, 0x7632);
  m[2] = __byte_perm(high_01, high_23, 0x5410);
  m[3] = __byte_perm(high_01, high_23, 0x7632);
}

// Pair p of byte b <-> pair b of byte p.
__device__ __forceinline__ uint32_t transpose_pairs(uint32_t x) {
  const uint32_t odd = (x ^ x >> 6) & 0x00cc00ccu;
  x ^= odd | odd << 6;
  const uint32_t upper = (x ^ x >> 12) & 0x0000f0f0u;
  return x ^ (upper | upper << 12);
}

// Word r of lane t of a quad <-> word t of lane r.
__device__ __forceinline__ void transpose_quad(uint32_t (&m)[4], int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? m[r] : m[r + 1], 1);
    (odd ? m[r] : m[r + 1]) = other;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? m[r] : m[r + 2], 2);
    (upper ? m[r] : m[r + 2]) = other;
  }
}

// --- ternary
// ------------------------------------------------------------------------------------------------

// 32 stored values of a row, of which the first `valid` exist, from any address; the others may be anything.
__device__ __forceinline__ uint2 load_stored_bytes(const uint8_t* bytes, int64_t valid) {
  uint32_t words[2] = {};
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    if (kCodesPerByte * b < valid) words[b / 4] |= static_cast<uint32_t>(bytes[b]) << (8 * (b % 4));
  }
  return make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void store_stored_bytes(uint8_t* bytes, int64_t valid, uint2 stored) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const uint32_t word = b < 4 ? stored.x : stored.y;
    if (kCodesPerByte * b < valid) bytes[b] = static_cast<uint8_t>(word >> (8 * (b % 4)));
  }
}

__global__ void __launch_bounds__(kThreads) prepack_ternary_kernel(
    const uint8_t* __restrict__ packed, int64_t N, int64_t K, BlockGrid grid, uint4* __restrict__ prepacked) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (block >= grid.count) return;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = grid.first_row(block) + lane / 4;
  const int64_t col = grid.first_col(block) + lane % 4 * kColsPerLane;
  const int64_t row_bytes = packed_bytes(K);
  const uint8_t* upper = packed + row * row_bytes + col / kCodesPerByte;
  const uint8_t* lower = upper + 8 * row_bytes;

  uint2 stored[2];
  if (row + 8 < N && col + kColsPerLane <= K && is_aligned(upper, 8) && is_aligned(lower, 8)) {
    stored[0] = *reinterpret_cast<const uint2*>(upper);
    stored[1] = *reinterpret_cast<const uint2*>(lower);
  } else {
    stored[0] = load_stored_bytes(upper, row < N ? K - col : 0);
    stored[1] = load_stored_bytes(lower, row + 8 < N ? K - col : 0);
  }

  // Register j = half of the rows + 2 x half of the step, from the last down: j = 0 has the top bits.
  uint32_t words[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t valid = row + 8 * half < N ? K - col : 0;
    words[3 - half] = keep_codes(signed_from_stored(stored[half].x), valid);
    words[1 - half] = keep_codes(signed_from_stored(stored[half].y), valid - 16);
  }
  transpose_bytes(words);
#pragma unroll
  for (int t = 0; t < 4; ++t) words[t] = transpose_pairs(words[t]);
  transpose_quad(words, lane);
  prepacked[static_cast<int64_t>(block) * kLanes + lane] = make_uint4(words[0], words[1], words[2], words[3]);
  __threadfence();
}

__global__ void __launch_bounds__(kThreads) unprepack_ternary_kernel(
    const uint4* __restrict__ prepacked, int64_t N, int64_t K, BlockGrid grid, uint8_t* __restrict__ packed) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (block >= grid.count) return;
  const int lane = threadIdx.x % kLanes;
  const uint4 vector = prepacked[static_cast<int64_t>(block) * kLanes + lane];
  uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  transpose_quad(words, lane);
#pragma unroll
  for (int t = 0; t < 4; ++t) words[t] = transpose_pairs(words[t]);
  transpose_bytes(words);

  const int64_t col = grid.first_col(block) + lane % 4 * kColsPerLane;
  const int64_t row_bytes = packed_bytes(K);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = grid.first_row(block) + lane / 4 + 8 * half;
    const int64_t valid = row < N ? K - col : 0;
    uint8_t* out = packed + row * row_bytes + col / kCodesPerByte;
    // Code 0 in the tail of the last byte, as the canonical layout demands.
    const uint2 stored = make_uint2(stored_from_signed(keep_codes(words[3 - half], valid)),
                                    stored_from_signed(keep_codes(words[1 - half], valid - 16)));
    if (valid >= kColsPerLane && is_aligned(out, 8)) {
      *reinterpret_cast<uint2*>(out) = stored;
    } else {
      store_stored_bytes(out, valid, stored);
    }
  }
}

// --- int8
// ---------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) prepack_int8_kernel(
    const int8_t* __restrict__ codes, int64_t N, int64_t K, BlockGrid grid, uint4* __restrict__ prepacked) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (block >= grid.count) return;
  const int lane = threadIdx.x % kLanes;
  const int64_t first_row = grid.first_row(block), first_col = grid.first_col(block);
  const int64_t row = first_row + lane / 4;
  const int64_t col = first_col + lane % 4 * 4;
  uint4* out = prepacked + static_cast<int64_t>(block) * kStepsPerBlock * kLanes + lane;

  // One branch for the whole warp, so that the 16 loads of a lane are in flight together.
  const bool whole =
      first_row + kBlockRows <= N && first_col + kBlockCols <= K && K % 4 == 0 && is_aligned(codes, 4);
  const auto load = [&](int step, int j) {
    const int64_t r = row + 8 * (j % 2), c = col + 32 * step + 16 * (j / 2);
    const int8_t* address = codes + r * K + c;
    if (whole) return *reinterpret_cast<const uint32_t*>(address);
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (r < N && c + i < K) four |= static_cast<uint32_t>(static_cast<uint8_t>(address[i])) << (8 * i);
    }
    return four;
  };
  if (whole) {
    uint4 vectors[kStepsPerBlock];
#pragma unroll
    for (int s = 0; s < kStepsPerBlock; ++s) {
      vectors[s] = make_uint4(load(s, 0), load(s, 1), load(s, 2), load(s, 3));
    }
#pragma unroll
    for (int s = 0; s < kStepsPerBlock; ++s) out[s * kLanes] = vectors[s];
  } else {
#pragma unroll 1
    for (int s = 0; s < kStepsPerBlock; ++s) {
      out[s * kLanes] = make_uint4(load(s, 0), load(s, 1), load(s, 2), load(s, 3));
    }
  }
  __threadfence();
}

// --- dequantisation
// -----------------------------------------------------------------------------------------

template <typename out_t>
struct DequantizeTraits {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(out_t));
  static constexpr int kWords = kVec / 4;        // a word gives 4 values of a row
  static constexpr int kCols = kLanes * kVec;    // of a thread block
  static constexpr int kWarps = kBlockRows / 2;  // warp g has the rows g and g + 8
  static constexpr int kThreads = kWarps * kLanes;
};

// code * scale for the codes in the top two bits of each byte, as 16 bytes of out_t.
template <typename out_t, int kWords>
__device__ __forceinline__ void scaled_codes(const uint32_t (&words)[kWords],
                                             float scale,
                                             uint32_t (&out)[4]) {
  if constexpr (sizeof(out_t) == 2) {
    // The four possible results as a table of 8 bytes, in which a byte permutation looks two codes up: the
    // bytes of entry c are 2 c and 2 c + 1.
    uint32_t table[2];
    out_t* entries = reinterpret_cast<out_t*>(table);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      entries[c] = from_float<out_t>(__fmul_rn(static_cast<float>(c < 2 ? c : c - 4), scale));
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t selectors = (words[w] >> 6 & 0x03030303u) * 0x22u + 0x10101010u;
      out[2 * w] = __byte_perm(table[0], table[1], selectors);
      out[2 * w + 1] = __byte_perm(table[0], table[1], selectors >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int code = static_cast<int>(words[0] << (24 - 8 * i)) >> 30;
      out[i] = __float_as_uint(__fmul_rn(__int2float_rn(code), scale));
    }
  }
}

// kWhole: the rows of `out` are aligned to 16 bytes and multiples of them.
template <typename out_t, bool kWhole>
__global__ void __launch_bounds__(DequantizeTraits<out_t>::kThreads)
    dequantize_prepacked_kernel(const uint32_t* __restrict__ prepacked,
                                const float* __restrict__ weight_scale,
                                bool scale_per_row,
                                int64_t N,
                                int64_t K,
                                int64_t blocks_wide,
                                out_t* __restrict__ out) {
  using Traits = DequantizeTraits<out_t>;
  using bits_t = std::conditional_t<sizeof(out_t) == 2, uint16_t, uint32_t>;
  constexpr int kVec = Traits::kVec;
  const int64_t vec = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int64_t col = vec * kVec;
  if (col >= K) return;
  const int g = threadIdx.x / kLanes;
  const int in_block = static_cast<int>(col % kBlockCols);
  const int step = in_block / 32, half_step = in_block / 16 % 2, t = in_block / 4 % 4;
  const uint32_t* column = prepacked + (col / kBlockCols * kLanes + 4 * g + t) * kStepsPerBlock + step;

  for (int64_t first_row = static_cast<int64_t>(blockIdx.y) * kBlockRows; first_row < N;
       first_row += static_cast<int64_t>(gridDim.y) * kBlockRows) {
    const uint32_t* source = column + first_row / kBlockRows * blocks_wide * (kTernaryBlockBytes / 4);
    uint32_t words[Traits::kWords];
#pragma unroll
    for (int w = 0; w < Traits::kWords; ++w) words[w] = source[w * kStepsPerBlock] << (4 * half_step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + g + 8 * half;
      if (row >= N) break;
      uint32_t raw[4];
      scaled_codes<out_t>(words, weight_scale[scale_per_row ? row : 0], raw);
      if constexpr (kWhole) {
        // Counted in vectors: from an address counted in elements nvcc makes four stores of 4 bytes.
        reinterpret_cast<uint4*>(out)[row * (K / kVec) + vec] = make_uint4(raw[0], raw[1], raw[2], raw[3]);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          constexpr int kPer = kVec / 4;
          if (col + i < K) {
            reinterpret_cast<bits_t*>(out)[row * K + col + i] =
                static_cast<bits_t>(raw[i / kPer] >> (16 * (i % kPer)));
          }
        }
      }
#pragma unroll
      for (int w = 0; w < Traits::kWords; ++w) words[w] <<= 2;
    }
  }
}

}  // namespace

cudaError_t launch_prepack_ternary(
    const uint8_t* packed, int64_t N, int64_t K, void* prepacked, cudaStream_t stream) {
  const BlockGrid grid = make_block_grid(N, K);
  if (grid.count == 0) return cudaErrorInvalidConfiguration;
  prepack_ternary_kernel<<<warp_grid(grid), kThreads, 0, stream>>>(
      packed, N, K, grid, static_cast<uint4*>(prepacked));
  return cudaGetLastError();
}

cudaError_t launch_unprepack_ternary(
    const void* prepacked, int64_t N, int64_t K, uint8_t* packed, cudaStream_t stream) {
  const BlockGrid grid = make_block_grid(N, K);
  if (grid.count == 0) return cudaErrorInvalidConfiguration;
  unprepack_ternary_kernel<<<warp_grid(grid), kThreads, 0, stream>>>(
      static_cast<const uint4*>(prepacked), N, K, grid, packed);
  return cudaGetLastError();
}

cudaError_t launch_prepack_int8(
    const int8_t* codes, int64_t N, int64_t K, void* prepacked, cudaStream_t stream) {
  const BlockGrid grid = make_block_grid(N, K);
  if (grid.count == 0) return cudaErrorInvalidConfiguration;
  prepack_int8_kernel<<<warp_grid(grid), kThreads, 0, stream>>>(
      codes, N, K, grid, static_cast<uint4*>(prepacked));
  return cudaGetLastError();
}

cudaError_t launch_dequantize_prepacked(const void* prepacked,
                                        const float* weight_scale,
                                        bool scale_per_row,
                                        int64_t N,
                                        int64_t K,
                                        DType dtype,
                                        void* out,
                                        cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using out_t = typename decltype(tag)::type;
    using Traits = DequantizeTraits<out_t>;
    constexpr int64_t kMaxGridY = 65535;
    const int64_t wide = ceil_div(K, Traits::kCols);
    if (wide > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(wide),
                    static_cast<unsigned>(block_rows(N) < kMaxGridY ? block_rows(N) : kMaxGridY));
    const bool whole = K % Traits::kVec == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const auto kernel =
        whole ? dequantize_prepacked_kernel<out_t, true> : dequantize_prepacked_kernel<out_t, false>;
    kernel<<<grid, Traits::kThreads, 0, stream>>>(static_cast<const uint32_t*>(prepacked),
                                                  weight_scale,
                                                  scale_per_row,
                                                  N,
                                                  K,
                                                  block_cols(K),
                                                  static_cast<out_t*>(out));
    return cudaGetLastError();
  });
}

}  // namespace bitnet_ext::cuda
