// The vectors of vec_scalar.h as one (fp64: two) AVX-512 register.
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"

namespace bitnet_ext::cpu::avx512 {
namespace {

struct VecF {
  __m512 a;
};
struct VecI {
  __m512i a;
};
struct VecD {
  __m512d a, b;
};
struct Mask {
  __mmask16 a;
};

inline VecF splat(float x) {
  return {_mm512_set1_ps(x)};
}
inline VecI splat_int(int32_t x) {
  return {_mm512_set1_epi32(x)};
}
inline VecI lane_index() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline VecD zero_double() {
  return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}

inline VecF operator+(VecF x, VecF y) {
  return {_mm512_add_ps(x.a, y.a)};
}
inline VecF operator-(VecF x, VecF y) {
  return {_mm512_sub_ps(x.a, y.a)};
}
inline VecF operator*(VecF x, VecF y) {
  return {_mm512_mul_ps(x.a, y.a)};
}
inline VecF operator/(VecF x, VecF y) {
  return {_mm512_div_ps(x.a, y.a)};
}
inline VecF sqrt(VecF x) {
  return {_mm512_sqrt_ps(x.a)};
}
inline VecF max(VecF x, VecF y) {
  return {_mm512_max_ps(x.a, y.a)};
}
inline VecF min(VecF x, VecF y) {
  return {_mm512_min_ps(x.a, y.a)};
}
inline Mask greater(VecF x, VecF y) {
  return {_mm512_cmp_ps_mask(x.a, y.a, _CMP_GT_OQ)};
}
inline VecF select(Mask m, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(m.a, y.a, x.a)};
}
inline VecI select(Mask m, VecI x, VecI y) {
  return {_mm512_mask_blend_epi32(m.a, y.a, x.a)};
}

inline VecI operator+(VecI x, VecI y) {
  return {_mm512_add_epi32(x.a, y.a)};
}
inline VecI operator-(VecI x, VecI y) {
  return {_mm512_sub_epi32(x.a, y.a)};
}
inline VecI operator&(VecI x, VecI y) {
  return {_mm512_and_si512(x.a, y.a)};
}
inline VecI max(VecI x, VecI y) {
  return {_mm512_max_epi32(x.a, y.a)};
}
inline VecI min(VecI x, VecI y) {
  return {_mm512_min_epi32(x.a, y.a)};
}
inline VecI shift_left_23(VecI x) {
  return {_mm512_slli_epi32(x.a, 23)};
}

inline VecI bits(VecF x) {
  return {_mm512_castps_si512(x.a)};
}
inline VecF from_bits(VecI x) {
  return {_mm512_castsi512_ps(x.a)};
}
inline VecI to_int(VecF x) {
  return {_mm512_cvtps_epi32(x.a)};
}
inline VecF to_float(VecI x) {
  return {_mm512_cvtepi32_ps(x.a)};
}

inline __m512d low_double(__m512 x) {
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
}
inline __m512d high_double(__m512 x) {
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
}
inline VecD add(VecD x, VecF y) {
  return {_mm512_add_pd(x.a, low_double(y.a)), _mm512_add_pd(x.b, high_double(y.a))};
}
// Fused, which is the same here: the product of two fp32 is exact in fp64.
inline VecD add_product(VecD x, VecF y, VecF z) {
  return {_mm512_fmadd_pd(low_double(y.a), low_double(z.a), x.a),
          _mm512_fmadd_pd(high_double(y.a), high_double(z.a), x.b)};
}

inline VecF load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline VecF load(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline VecF load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline VecI load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline VecI load_i32(const int32_t* p) {
  return {_mm512_loadu_si512(p)};
}

inline void store(float* p, VecF x) {
  _mm512_storeu_ps(p, x.a);
}
// Rounds to nearest even on the bits; NaN becomes 0x7fc0. vcvtneps2bf16 would flush subnormals.
inline void store(Bf16* p, VecF x) {
  const __m512i raw = _mm512_castps_si512(x.a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded =
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x.a, x.a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void store(Half* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(double* p, VecD x) {
  _mm512_storeu_pd(p, x.a);
  _mm512_storeu_pd(p + 8, x.b);
}
inline void store_i32(int32_t* p, VecI x) {
  _mm512_storeu_si512(p, x.a);
}
// For lanes within int8.
inline void store_i8(int8_t* p, VecI x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.a));
}

}  // namespace
}  // namespace bitnet_ext::cpu::avx512
