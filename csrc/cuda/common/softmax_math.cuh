// exp, maximum and soft-cap of logits for the kernels of the loss: exact in float32, fast where the logits
// are bfloat16.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace bitnet_ext::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// NaN when either is, unlike fmaxf.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// How each element type computes exp(z - max): `shift` is the argument in units of kUnit.
template <typename scalar_t>
struct RowMath;

template <>
struct RowMath<float> {
  static constexpr float kUnit = 1.0f;
  using Max = float;
  static __device__ __forceinline__ float base(float max) {
    return max;
  }
  static __device__ __forceinline__ float shift(float z, float base) {
    return z - base;
  }
  static __device__ __forceinline__ float exponential(float shift) {
    return expf(shift);
  }
  static __device__ __forceinline__ float capped(float raw, float cap, float inverse_cap) {
    return cap * tanhf(raw * inverse_cap);
  }
  static __device__ __forceinline__ Max no_max() {
    return -INFINITY;
  }
  static __device__ __forceinline__ Max vector_max(const uint4& v) {
    return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)),
                 fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
  static __device__ __forceinline__ Max larger(Max a, Max b) {
    return fmaxf(a, b);
  }
  static __device__ __forceinline__ float single(Max max) {
    return max;
  }
};

// Logits of 8 bits do not notice the 2^-22 of ex2.approx, nor that of a base rounded once a row, which p = e
// / sum cancels.
template <>
struct RowMath<__nv_bfloat16> {
  static constexpr float kUnit = kLn2;
  using Max = __nv_bfloat162;
  static __device__ __forceinline__ float base(float max) {
    return max * kLog2e;
  }
  static __device__ __forceinline__ float shift(float z, float base) {
    return fmaf(z, kLog2e, -base);
  }
  static __device__ __forceinline__ float exponential(float shift) {
    return exp2_fast(shift);
  }
  static __device__ __forceinline__ float capped(float raw, float cap, float inverse_cap) {
    return fmaf(-2.0f * cap, reciprocal_fast(1.0f + exp2_fast(2.0f * kLog2e * raw * inverse_cap)), cap);
  }
  static __device__ __forceinline__ Max pair(uint32_t word) {
    return *reinterpret_cast<const __nv_bfloat162*>(&word);
  }
  static __device__ __forceinline__ Max no_max() {
    return pair(0xff80ff80u);
  }
  static __device__ __forceinline__ Max vector_max(const uint4& v) {
    return __hmax2(__hmax2(pair(v.x), pair(v.y)), __hmax2(pair(v.z), pair(v.w)));
  }
  static __device__ __forceinline__ Max larger(Max a, Max b) {
    return __hmax2(a, b);
  }
  static __device__ __forceinline__ float single(Max max) {
    return fmaxf(__low2float(max), __high2float(max));
  }
};

__device__ __forceinline__ void unpack(const uint4& v, float (&values)[4]) {
  values[0] = __uint_as_float(v.x);
  values[1] = __uint_as_float(v.y);
  values[2] = __uint_as_float(v.z);
  values[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&values)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

}  // namespace bitnet_ext::cuda
