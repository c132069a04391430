// The vectors of vec_scalar.h as two (fp64: four) AVX2 registers; lane i of 16 is in register i / 8 (i / 4).
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"

namespace bitnet_ext::cpu::avx2 {
namespace {

struct VecF {
  __m256 a, b;
};
struct VecI {
  __m256i a, b;
};
struct VecD {
  __m256d a, b, c, d;
};
struct Mask {
  __m256 a, b;
};

inline VecF splat(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline VecI splat_int(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline VecI lane_index() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline VecD zero_double() {
  const __m256d z = _mm256_setzero_pd();
  return {z, z, z, z};
}

inline VecF operator+(VecF x, VecF y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline VecF operator-(VecF x, VecF y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline VecF operator*(VecF x, VecF y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline VecF operator/(VecF x, VecF y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline VecF sqrt(VecF x) {
  return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
}
inline VecF max(VecF x, VecF y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline VecF min(VecF x, VecF y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
inline Mask greater(VecF x, VecF y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline VecF select(Mask m, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
inline VecI select(Mask m, VecI x, VecI y) {
  return {_mm256_blendv_epi8(y.a, x.a, _mm256_castps_si256(m.a)),
          _mm256_blendv_epi8(y.b, x.b, _mm256_castps_si256(m.b))};
}

inline VecI operator+(VecI x, VecI y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline VecI operator-(VecI x, VecI y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
inline VecI operator&(VecI x, VecI y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline VecI max(VecI x, VecI y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
inline VecI min(VecI x, VecI y) {
  return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)};
}
inline VecI shift_left_23(VecI x) {
  return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)};
}

inline VecI bits(VecF x) {
  return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
inline VecF from_bits(VecI x) {
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
inline VecI to_int(VecF x) {
  return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
inline VecF to_float(VecI x) {
  return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}

inline __m256d low_double(__m256 x) {
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
}
inline __m256d high_double(__m256 x) {
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
}
inline VecD add(VecD x, VecF y) {
  return {_mm256_add_pd(x.a, low_double(y.a)),
          _mm256_add_pd(x.b, high_double(y.a)),
          _mm256_add_pd(x.c, low_double(y.b)),
          _mm256_add_pd(x.d, high_double(y.b))};
}
// Fused, which is the same here: the product of two fp32 is exact in fp64.
inline VecD add_product(VecD x, VecF y, VecF z) {
  return {_mm256_fmadd_pd(low_double(y.a), low_double(z.a), x.a),
          _mm256_fmadd_pd(high_double(y.a), high_double(z.a), x.b),
          _mm256_fmadd_pd(low_double(y.b), low_double(z.b), x.c),
          _mm256_fmadd_pd(high_double(y.b), high_double(z.b), x.d)};
}

inline VecF load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline __m256 widen_bf16(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline VecF load(const Bf16* p) {
  return {widen_bf16(p), widen_bf16(p + 8)};
}
inline VecF load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline VecI load_i8(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(raw), _mm256_cvtepi8_epi32(_mm_srli_si128(raw, 8))};
}
inline VecI load_i32(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}

inline void store(float* p, VecF x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
// Rounds to nearest even on the bits; NaN becomes 0x7fc0.
inline __m256i round_bf16(__m256 x) {
  const __m256i raw = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store(Bf16* p, VecF x) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(Half* p, VecF x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, kNearest));
}
inline void store(double* p, VecD x) {
  _mm256_storeu_pd(p, x.a);
  _mm256_storeu_pd(p + 4, x.b);
  _mm256_storeu_pd(p + 8, x.c);
  _mm256_storeu_pd(p + 12, x.d);
}
inline void store_i32(int32_t* p, VecI x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
// For lanes within int8.
inline void store_i8(int8_t* p, VecI x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

}  // namespace
}  // namespace bitnet_ext::cpu::avx2
