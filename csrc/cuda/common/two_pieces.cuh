// fp32 numbers as the sum of two fp16 numbers, for products on fp16 tensor cores with the accuracy of fp32.
//
// A number times a power of two that brings the largest of its row (of the contraction, in this tile) to
// 2^14 .. 2^15 is the sum of two fp16 numbers to 22 bits, or to 2^-39 of that largest one. Three of the four
// products of such pairs, hi hi + hi lo + lo hi, are therefore as good as fp32, and cost half of what the
// same scheme costs in TF32 and half of six products of three bf16 pieces. The powers of two are found where
// the numbers are loaded anyway, and every row of a tile has its own, so nothing is assumed about magnitudes.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"

namespace bitnet_ext::cuda {

__device__ __forceinline__ uint32_t magnitude(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}
__device__ __forceinline__ uint32_t magnitude(const float4& v) {
  return max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
}

// The larger magnitude, NaN when one of them is: one instruction, and two where magnitudes are compared as
// integers.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float top;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(top) : "f"(fabsf(a)), "f"(fabsf(b)));
  return top;
}

// The largest of the lanes whose numbers differ in the bits kFirst .. kLast, each a power of two.
template <int kFirst, int kLast>
__device__ __forceinline__ uint32_t lanes_max(uint32_t v) {
#pragma unroll
  for (int bit = kFirst; bit <= kLast; bit <<= 1) v = max(v, __shfl_xor_sync(kFullWarp, v, bit));
  return v;
}

// A power of two and its inverse for numbers of which `top` is the largest magnitude. What is below 2^-112 is
// not brought up to 2^14 any more. With an Inf or NaN the inverse is Inf: the pieces of Inf are finite, so
// that Inf * b_hi + Inf * b_lo is no NaN, and the sum gets its sign from them.
struct Scale {
  uint32_t exponent;
  __device__ __forceinline__ explicit Scale(uint32_t top) : exponent(min(268u - (top >> 23), 253u)) {}
  __device__ __forceinline__ float up() const {
    return __uint_as_float(exponent << 23);
  }
  __device__ __forceinline__ float down() const {
    return __uint_as_float(exponent == 13u ? 0x7f800000u : (254u - exponent) << 23);
  }
};

struct Pieces {
  uint32_t hi, lo;
};

// Rounded to nearest even, the largest fp16 number instead of Inf; NaN stays.
__device__ __forceinline__ uint32_t finite_half2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ Pieces split(float x, float y, float scale) {
  x *= scale, y *= scale;
  Pieces pieces;
  pieces.hi = finite_half2(x, y);
  const float2 back = __half22float2(*reinterpret_cast<const __half2*>(&pieces.hi));
  pieces.lo = finite_half2(x - back.x, y - back.y);
  return pieces;
}

// Four neighbours to two places in shared memory.
__device__ __forceinline__ void split_to(const float4& v, float scale, uint8_t* hi, uint8_t* lo) {
  const Pieces first = split(v.x, v.y, scale), second = split(v.z, v.w, scale);
  *reinterpret_cast<uint2*>(hi) = make_uint2(first.hi, second.hi);
  *reinterpret_cast<uint2*>(lo) = make_uint2(first.lo, second.lo);
}

// The first `valid` of four neighbours; `p` is 16-byte aligned.
__device__ __forceinline__ float4 load_4(const float* p, int valid) {
  if (valid >= 4) return *reinterpret_cast<const float4*>(p);
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (valid > 0) v.x = p[0];
  if (valid > 1) v.y = p[1];
  if (valid > 2) v.z = p[2];
  return v;
}

}  // namespace bitnet_ext::cuda
