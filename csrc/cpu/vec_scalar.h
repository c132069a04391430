// The 16-lane vectors of generic/*.inl in plain C++: VecF (fp32), VecI (int32), VecD (fp64) and Mask. The
// files vec_avx2.h and vec_avx512.h offer the same names with intrinsics. Every operation here is one IEEE
// operation a lane, which is what makes the instruction sets agree bit for bit.
#pragma once

#include "cpu/kernels.h"

namespace bitnet_ext::cpu::scalar {
namespace {

struct VecF {
  float lane[16];
};
struct VecI {
  int32_t lane[16];
};
struct VecD {
  double lane[16];
};
// -1 or 0, as wide as what it selects, so that compilers can vectorise the loops.
struct Mask {
  int32_t lane[16];
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

#define BITNET_EXT_EACH_LANE(Type, expression)           \
  Type r;                                                \
  for (int i = 0; i < 16; ++i) r.lane[i] = (expression); \
  return r

inline VecF splat(float x) {
  BITNET_EXT_EACH_LANE(VecF, x);
}
inline VecI splat_int(int32_t x) {
  BITNET_EXT_EACH_LANE(VecI, x);
}
inline VecI lane_index() {
  BITNET_EXT_EACH_LANE(VecI, i);
}
inline VecD zero_double() {
  BITNET_EXT_EACH_LANE(VecD, 0.0);
}

inline VecF operator+(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] + b.lane[i]);
}
inline VecF operator-(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] - b.lane[i]);
}
inline VecF operator*(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] * b.lane[i]);
}
inline VecF operator/(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] / b.lane[i]);
}
inline VecF sqrt(VecF a) {
  BITNET_EXT_EACH_LANE(VecF, __builtin_sqrtf(a.lane[i]));
}
// Both return b when a lane holds NaN, as maxps and minps do.
inline VecF max(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
inline VecF min(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]);
}
inline Mask greater(VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(Mask, a.lane[i] > b.lane[i] ? -1 : 0);
}
inline VecF select(Mask m, VecF a, VecF b) {
  BITNET_EXT_EACH_LANE(VecF, m.lane[i] ? a.lane[i] : b.lane[i]);
}
inline VecI select(Mask m, VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, m.lane[i] ? a.lane[i] : b.lane[i]);
}

inline int32_t wrap(uint32_t x) {
  return static_cast<int32_t>(x);
}
inline uint32_t wide(int32_t x) {
  return static_cast<uint32_t>(x);
}
inline VecI operator+(VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, wrap(wide(a.lane[i]) + wide(b.lane[i])));
}
inline VecI operator-(VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, wrap(wide(a.lane[i]) - wide(b.lane[i])));
}
inline VecI operator&(VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, a.lane[i] & b.lane[i]);
}
inline VecI max(VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
inline VecI min(VecI a, VecI b) {
  BITNET_EXT_EACH_LANE(VecI, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]);
}
inline VecI shift_left_23(VecI a) {
  BITNET_EXT_EACH_LANE(VecI, wrap(wide(a.lane[i]) << 23));
}

inline VecI bits(VecF a) {
  BITNET_EXT_EACH_LANE(VecI, wrap(float_bits(a.lane[i])));
}
inline VecF from_bits(VecI a) {
  BITNET_EXT_EACH_LANE(VecF, bits_float(wide(a.lane[i])));
}
// Rounds half to even, for |a| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
inline VecI to_int(VecF a) {
  BITNET_EXT_EACH_LANE(VecI, wrap(float_bits(a.lane[i] + 12582912.0f) - 0x4b400000u));
}
inline VecF to_float(VecI a) {
  BITNET_EXT_EACH_LANE(VecF, static_cast<float>(a.lane[i]));
}

inline VecD add(VecD a, VecF b) {
  BITNET_EXT_EACH_LANE(VecD, a.lane[i] + static_cast<double>(b.lane[i]));
}
// The product of two fp32 is exact in fp64, so only the sum rounds.
inline VecD add_product(VecD a, VecF b, VecF c) {
  BITNET_EXT_EACH_LANE(VecD, a.lane[i] + static_cast<double>(b.lane[i]) * static_cast<double>(c.lane[i]));
}

inline VecF load(const float* p) {
  BITNET_EXT_EACH_LANE(VecF, p[i]);
}
inline VecF load(const Bf16* p) {
  BITNET_EXT_EACH_LANE(VecF, bits_float(wide(p[i].bits) << 16));
}

inline float half_to_float(uint16_t half) {
  constexpr uint32_t kRebias = 112u << 23;  // the exponent biases, 127 - 15
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t exponent = bits & 0x0f800000u;
  bits += kRebias;
  if (exponent == 0x0f800000u) {
    bits += kRebias;
    if (bits & 0x007fffffu) bits |= 0x00400000u;  // a NaN comes out quiet, as from vcvtph2ps
  } else if (exponent == 0) {
    // Subnormal: give it the exponent of 2^-14 and take the implied one away again, which is exact.
    bits = float_bits(bits_float(bits + (1u << 23)) - bits_float(113u << 23));
  }
  return bits_float(bits | sign);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the step is 2^-24, that of fp32 at 0.5: the addition does the rounding.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline VecF load(const Half* p) {
  BITNET_EXT_EACH_LANE(VecF, half_to_float(p[i].bits));
}
inline VecI load_i8(const int8_t* p) {
  BITNET_EXT_EACH_LANE(VecI, p[i]);
}
inline VecI load_i32(const int32_t* p) {
  BITNET_EXT_EACH_LANE(VecI, p[i]);
}

#undef BITNET_EXT_EACH_LANE

inline void store(float* p, VecF a) {
  for (int i = 0; i < 16; ++i) p[i] = a.lane[i];
}
inline void store(Bf16* p, VecF a) {
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_bf16(a.lane[i]);
}
inline void store(Half* p, VecF a) {
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_half(a.lane[i]);
}
inline void store(double* p, VecD a) {
  for (int i = 0; i < 16; ++i) p[i] = a.lane[i];
}
inline void store_i32(int32_t* p, VecI a) {
  for (int i = 0; i < 16; ++i) p[i] = a.lane[i];
}
// The low byte of every lane.
inline void store_i8(int8_t* p, VecI a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
}

}  // namespace
}  // namespace bitnet_ext::cpu::scalar
