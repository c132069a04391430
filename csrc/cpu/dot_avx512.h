// The integer product with AVX-512 VNNI. vpdpbusd multiplies unsigned by signed bytes and adds groups of four
// to int32: the stored values 0 .. 2 are the unsigned side, so no compensation beyond the sum of x is needed.
//
// Large M is bound by vpdpbusd (64 products each), M = 1 by reading the weights. A tile of kRows x kTokens
// accumulators stays in registers; every loaded vector of x serves kRows rows and every unpacked vector of
// weights kTokens tokens.
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"
#include "packing.h"

namespace bitnet_ext::cpu::avx512 {
namespace {

// Measured on Zen 4 with one thread: 225 GMAC/s for 4 x 4 accumulators, 3.5 vpdpbusd a nanosecond, which is
// one a cycle and all the CPU has. 4 x 5 (216) and 6 x 4 (176) spill.
constexpr int kTileRows = 4;
constexpr int kTileTokens = 4;
constexpr int kTileRowsOne = 8;  // for a single token: 8 independent chains hide the latency of vpdpbusd

// Sums of 4 vectors of 16 int32.
inline __m128i reduce4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const auto fold = [](__m512i x) {
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  };
  const __m256i ab = _mm256_hadd_epi32(fold(a), fold(b));
  const __m256i cd = _mm256_hadd_epi32(fold(c), fold(d));
  const __m256i abcd = _mm256_hadd_epi32(ab, cd);
  return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

// kPlane: which two bits of every byte.
template <int kPlane>
inline __m512i stored_values(__m512i packed) {
  const __m512i mask = _mm512_set1_epi8(3);
  // The mask drops what a 16-bit shift brings in from the neighbouring byte.
  return _mm512_and_si512(kPlane == 0 ? packed : _mm512_srli_epi16(packed, 2 * kPlane), mask);
}

template <int kPlane, int kRows, int kTokens>
inline void add_plane(const __m512i* packed, const int8_t* block, int64_t stride, __m512i (*sum)[kTokens]) {
  __m512i stored[kRows];
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n) stored[n] = stored_values<kPlane>(packed[n]);
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const __m512i x = _mm512_loadu_si512(block + m * stride + 64 * kPlane);
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) sum[n][m] = _mm512_dpbusd_epi32(sum[n][m], stored[n], x);
  }
}

template <int kRows, int kTokens>
inline void add_block(const __m512i* packed, const int8_t* block, int64_t stride, __m512i (*sum)[kTokens]) {
  add_plane<0, kRows, kTokens>(packed, block, stride, sum);
  add_plane<1, kRows, kTokens>(packed, block, stride, sum);
  add_plane<2, kRows, kTokens>(packed, block, stride, sum);
  add_plane<3, kRows, kTokens>(packed, block, stride, sum);
}

// One tile: kRows rows of packed by kTokens tokens.
template <int kRows, int kTokens>
inline void tile(const int8_t* planes,
                 const int32_t* sums,
                 const uint8_t* packed,
                 int64_t row_bytes,
                 int64_t stride,
                 int32_t* acc,
                 int64_t ld) {
  __m512i sum[kRows][kTokens];
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) sum[n][m] = _mm512_setzero_si512();
  }
  __m512i bytes[kRows];
  int64_t j = 0;
  for (; j + 64 <= row_bytes; j += 64) {
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) bytes[n] = _mm512_loadu_si512(packed + n * row_bytes + j);
    add_block<kRows, kTokens>(bytes, planes + 4 * j, stride, sum);
  }
  if (j < row_bytes) {
    const __mmask64 tail = ~0ull >> (64 - (row_bytes - j));
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) bytes[n] = _mm512_maskz_loadu_epi8(tail, packed + n * row_bytes + j);
    add_block<kRows, kTokens>(bytes, planes + 4 * j, stride, sum);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    if constexpr (kRows % 4 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < kRows; n += 4) {
        const __m128i total = reduce4(sum[n][m], sum[n + 1][m], sum[n + 2][m], sum[n + 3][m]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + m * ld + n),
                         _mm_sub_epi32(total, _mm_set1_epi32(sums[m])));
      }
    } else {
      for (int n = 0; n < kRows; ++n) acc[m * ld + n] = _mm512_reduce_add_epi32(sum[n][m]) - sums[m];
    }
  }
}

template <int kRows, int kTokens>
inline void all_rows(const int8_t* planes,
                     const int32_t* sums,
                     const uint8_t* packed,
                     int64_t rows,
                     int64_t row_bytes,
                     int64_t stride,
                     int32_t* acc,
                     int64_t ld) {
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows) {
    tile<kRows, kTokens>(planes, sums, packed + n * row_bytes, row_bytes, stride, acc + n, ld);
  }
  for (; n < rows; ++n) {
    tile<1, kTokens>(planes, sums, packed + n * row_bytes, row_bytes, stride, acc + n, ld);
  }
}

void dot(const int8_t* planes,
         const int32_t* sums,
         int64_t tokens,
         const uint8_t* packed,
         int64_t rows,
         int64_t K,
         int32_t* acc,
         int64_t ld) {
  const int64_t bytes = packed_bytes(K);
  const int64_t stride = (K + kDotBlock - 1) / kDotBlock * kDotBlock;
  int64_t m = 0;
  for (; m + kTileTokens <= tokens; m += kTileTokens) {
    all_rows<kTileRows, kTileTokens>(
        planes + m * stride, sums + m, packed, rows, bytes, stride, acc + m * ld, ld);
  }
  planes += m * stride;
  sums += m;
  acc += m * ld;
  switch (tokens - m) {
    case 3:
      return all_rows<kTileRows, 3>(planes, sums, packed, rows, bytes, stride, acc, ld);
    case 2:
      return all_rows<kTileRows, 2>(planes, sums, packed, rows, bytes, stride, acc, ld);
    case 1:
      return all_rows<kTileRowsOne, 1>(planes, sums, packed, rows, bytes, stride, acc, ld);
  }
}

}  // namespace
}  // namespace bitnet_ext::cpu::avx512
