// Packing, unpacking and dequantisation: one pass over memory each, bound by its bandwidth.
//
// A thread handles one unit. Where every row allows it (K a multiple of 16 and aligned pointers) a unit of
// pack and unpack is 16 codes and one 32-bit word of packed weights, so that the wide side moves 16 bytes an
// access; otherwise it is the 4 codes of one byte. Dequantisation always goes by 4 values: 16 bytes of fp32.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/row_tiling.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/pack.h"
#include "packing.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = RowTiling::kThreads;

// The packed byte of four codes, one in each byte of `codes`, clamped to {-1, 0, 1}.
__device__ __forceinline__ uint32_t pack_codes(uint32_t codes) {
  // Saturating compare, a byte at a time: __vmaxs4 and __vmins4 are the SIMD video instructions' form.
  const uint32_t clamped = __vmins4(__vmaxs4(codes, 0xffffffffu), 0x01010101u);
  return gather_byte(stored_from_codes(clamped));
}

__device__ __forceinline__ uint32_t unpack_codes(uint32_t byte) {
  const uint32_t stored = spread_byte(static_cast<uint8_t>(byte));
  // 3 -> 2: clear the low bit where both bits are set.
  return codes_from_stored(stored & ~(stored >> 1 & 0x01010101u));
}

template <bool kWords>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const int8_t* __restrict__ codes, RowTiling tiling, int64_t K, uint8_t* __restrict__ packed) {
  const int64_t row = tiling.row(blockIdx.x);
  const int64_t unit = tiling.unit(blockIdx.x);
  if (row >= tiling.rows || unit >= tiling.units) return;
  if constexpr (kWords) {
    const uint4 in = *reinterpret_cast<const uint4*>(codes + row * K + unit * 16);
    const uint32_t word =
        pack_codes(in.x) | pack_codes(in.y) << 8 | pack_codes(in.z) << 16 | pack_codes(in.w) << 24;
    *reinterpret_cast<uint32_t*>(packed + (row * tiling.units + unit) * 4) = word;
  } else {
    const int8_t* in = codes + row * K + unit * 4;
    const int64_t valid = K - unit * 4;
    uint32_t four = 0;  // places beyond K hold code 0
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) four |= static_cast<uint32_t>(static_cast<uint8_t>(in[i])) << (8 * i);
    }
    packed[row * tiling.units + unit] = static_cast<uint8_t>(pack_codes(four));
  }
}

template <bool kWords>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint8_t* __restrict__ packed,
                                                          RowTiling tiling,
                                                          int64_t K,
                                                          int8_t* __restrict__ codes) {
  const int64_t row = tiling.row(blockIdx.x);
  const int64_t unit = tiling.unit(blockIdx.x);
  if (row >= tiling.rows || unit >= tiling.units) return;
  if constexpr (kWords) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(packed + (row * tiling.units + unit) * 4);
    const uint4 out = make_uint4(unpack_codes(word & 0xff),
                                 unpack_codes(word >> 8 & 0xff),
                                 unpack_codes(word >> 16 & 0xff),
                                 unpack_codes(word >> 24));
    *reinterpret_cast<uint4*>(codes + row * K + unit * 16) = out;
  } else {
    const uint32_t four = unpack_codes(packed[row * tiling.units + unit]);
    int8_t* out = codes + row * K + unit * 4;
    const int64_t valid = K - unit * 4;
    if (valid >= 4 && is_aligned(out, 4)) {
      *reinterpret_cast<uint32_t*>(out) = four;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < valid) out[i] = static_cast<int8_t>(four >> (8 * i));
      }
    }
  }
}

// out[i] = T(int8 value i of `four` * scale)
template <typename out_t>
__device__ __forceinline__ void store_scaled(out_t* out, int64_t valid, uint32_t four, float scale) {
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int value = static_cast<int8_t>(four >> (8 * i));
    values[i] = __fmul_rn(__int2float_rn(value), scale);
  }
  store_floats(out, valid, is_aligned(out, 4 * sizeof(out_t)), values);
}

template <typename out_t>
__global__ void __launch_bounds__(kThreads) dequantize_ternary_kernel(const uint8_t* __restrict__ packed,
                                                                      const float* __restrict__ weight_scale,
                                                                      bool scale_per_row,
                                                                      RowTiling tiling,
                                                                      int64_t K,
                                                                      out_t* __restrict__ out) {
  const int64_t row = tiling.row(blockIdx.x);
  const int64_t unit = tiling.unit(blockIdx.x);
  if (row >= tiling.rows || unit >= tiling.units) return;
  const uint32_t four = unpack_codes(packed[row * tiling.units + unit]);
  store_scaled(out + row * K + unit * 4, K - unit * 4, four, weight_scale[scale_per_row ? row : 0]);
}

template <typename out_t>
__global__ void __launch_bounds__(kThreads) dequantize_act_kernel(const int8_t* __restrict__ x_i8,
                                                                  const float* __restrict__ act_scale,
                                                                  RowTiling tiling,
                                                                  int64_t K,
                                                                  out_t* __restrict__ out) {
  const int64_t row = tiling.row(blockIdx.x);
  const int64_t unit = tiling.unit(blockIdx.x);
  if (row >= tiling.rows || unit >= tiling.units) return;
  const int8_t* in = x_i8 + row * K + unit * 4;
  const int64_t valid = K - unit * 4;
  uint32_t four = 0;
  if (valid >= 4 && is_aligned(in, 4)) {
    four = *reinterpret_cast<const uint32_t*>(in);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) four |= static_cast<uint32_t>(static_cast<uint8_t>(in[i])) << (8 * i);
    }
  }
  store_scaled(out + row * K + unit * 4, valid, four, act_scale[row]);
}

// Eight values a row of four rows, whose loads are under way together: 32 bytes a thread in flight are what
// this kernel, that reads a byte a value, can have. Values are made of bytes without the conversion unit:
// byte b under the exponent of 2^23 is 2^23 + b.
constexpr int kDequantizeRows = 4;
// From here on; fewer values are spread over more threads.
constexpr int64_t kManyValues = int64_t{1} << 21;

__device__ __forceinline__ float float_of_biased(uint32_t biased, uint32_t selector) {
  return __uint_as_float(__byte_perm(biased, 0x4b000000u, selector)) - 8388736.0f;
}

template <typename out_t>
__global__ void __launch_bounds__(kThreads) dequantize_act_vectors_kernel(const int8_t* __restrict__ x_i8,
                                                                          const float* __restrict__ act_scale,
                                                                          RowTiling tiling,
                                                                          int64_t M,
                                                                          int64_t K,
                                                                          out_t* __restrict__ out) {
  const int64_t first = tiling.row(blockIdx.x), k = tiling.unit(blockIdx.x) * 8;
  if (first >= tiling.rows || k >= K) return;
  uint2 eight[kDequantizeRows];
  float scale[kDequantizeRows];
#pragma unroll
  for (int i = 0; i < kDequantizeRows; ++i) {
    const int64_t row = first + i * tiling.rows;
    eight[i] = make_uint2(0, 0);
    scale[i] = 0.0f;
    if (row >= M) continue;
    eight[i] = *reinterpret_cast<const uint2*>(x_i8 + row * K + k);
    scale[i] = act_scale[row];
  }
#pragma unroll
  for (int i = 0; i < kDequantizeRows; ++i) {
    const int64_t row = first + i * tiling.rows;
    if (row >= M) break;
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t biased = (j < 4 ? eight[i].x : eight[i].y) ^ 0x80808080u;
      values[j] = __fmul_rn(float_of_biased(biased, 0x7440u | static_cast<uint32_t>(j % 4)), scale[i]);
    }
    store_floats(out + row * K + k, 8, true, values);
  }
}

bool can_use_words(const void* codes, const void* packed, int64_t K) {
  return K % 16 == 0 && reinterpret_cast<uintptr_t>(codes) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(packed) % 4 == 0;
}

}  // namespace

cudaError_t launch_pack_ternary(
    const int8_t* codes, int64_t N, int64_t K, uint8_t* packed, cudaStream_t stream) {
  const bool words = can_use_words(codes, packed, K);
  const RowTiling tiling = make_row_tiling(N, words ? K / 16 : packed_bytes(K));
  if (tiling.num_tiles == 0) return cudaErrorInvalidConfiguration;
  if (words) {
    pack_kernel<true><<<tiling.num_tiles, kThreads, 0, stream>>>(codes, tiling, K, packed);
  } else {
    pack_kernel<false><<<tiling.num_tiles, kThreads, 0, stream>>>(codes, tiling, K, packed);
  }
  return cudaGetLastError();
}

cudaError_t launch_unpack_ternary(
    const uint8_t* packed, int64_t N, int64_t K, int8_t* codes, cudaStream_t stream) {
  const bool words = can_use_words(codes, packed, K);
  const RowTiling tiling = make_row_tiling(N, words ? K / 16 : packed_bytes(K));
  if (tiling.num_tiles == 0) return cudaErrorInvalidConfiguration;
  if (words) {
    unpack_kernel<true><<<tiling.num_tiles, kThreads, 0, stream>>>(packed, tiling, K, codes);
  } else {
    unpack_kernel<false><<<tiling.num_tiles, kThreads, 0, stream>>>(packed, tiling, K, codes);
  }
  return cudaGetLastError();
}

cudaError_t launch_dequantize_ternary(const uint8_t* packed,
                                      const float* weight_scale,
                                      bool scale_per_row,
                                      int64_t N,
                                      int64_t K,
                                      DType dtype,
                                      void* out,
                                      cudaStream_t stream) {
  const RowTiling tiling = make_row_tiling(N, packed_bytes(K));
  if (tiling.num_tiles == 0) return cudaErrorInvalidConfiguration;
  return dispatch_dtype(dtype, [&](auto tag) {
    using out_t = typename decltype(tag)::type;
    dequantize_ternary_kernel<out_t><<<tiling.num_tiles, kThreads, 0, stream>>>(
        packed, weight_scale, scale_per_row, tiling, K, static_cast<out_t*>(out));
    return cudaGetLastError();
  });
}

cudaError_t launch_dequantize_act(const int8_t* x_i8,
                                  const float* act_scale,
                                  int64_t M,
                                  int64_t K,
                                  DType dtype,
                                  void* out,
                                  cudaStream_t stream) {
  if (M == 0) return cudaSuccess;
  const bool vectors = K % 8 == 0 && reinterpret_cast<uintptr_t>(x_i8) % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % 16 == 0 && M * K >= kManyValues;
  const RowTiling tiling =
      vectors ? make_row_tiling(ceil_div(M, kDequantizeRows), K / 8) : make_row_tiling(M, ceil_div(K, 4));
  if (tiling.num_tiles == 0) return cudaErrorInvalidConfiguration;
  return dispatch_dtype(dtype, [&](auto tag) {
    using out_t = typename decltype(tag)::type;
    if (vectors) {
      dequantize_act_vectors_kernel<out_t><<<tiling.num_tiles, kThreads, 0, stream>>>(
          x_i8, act_scale, tiling, M, K, static_cast<out_t*>(out));
      return cudaGetLastError();
    }
    dequantize_act_kernel<out_t>
        <<<tiling.num_tiles, kThreads, 0, stream>>>(x_i8, act_scale, tiling, K, static_cast<out_t*>(out));
    return cudaGetLastError();
  });
}

}  // namespace bitnet_ext::cuda
