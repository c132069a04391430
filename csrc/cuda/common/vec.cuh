// Loads and stores of short runs of elements as fp32.
//
// Rows of these operators start anywhere: K need not be a multiple of a vector and a view may begin at any
// element. Each helper takes the 16-byte path when the caller found the run aligned and whole, and goes
// element by element otherwise; elements at and beyond `valid` are never touched and read as zero.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace bitnet_ext::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ bool is_aligned(const void* pointer, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Two 16-bit values, rounded to nearest even, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// An integer type of exactly kBytes bytes: the unit of one memory instruction.
template <int kBytes>
struct RawBits;
template <>
struct RawBits<16> {
  using type = uint4;
};
template <>
struct RawBits<8> {
  using type = uint2;
};
template <>
struct RawBits<4> {
  using type = uint32_t;
};
template <>
struct RawBits<2> {
  using type = uint16_t;
};

// out[i] = p[i] for i < min(valid, N), else 0. `aligned`: p is a multiple of min(16, N * sizeof(T)) bytes.
template <int N, typename T>
__device__ __forceinline__ void load_floats(const T* p, int64_t valid, bool aligned, float (&out)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T)) < 16 ? N * static_cast<int>(sizeof(T)) : 16;
  constexpr int kPer = kBytes / static_cast<int>(sizeof(T));
  using raw_t = typename RawBits<kBytes>::type;
  if (aligned && valid >= N) {
#pragma unroll
    for (int part = 0; part < N / kPer; ++part) {
      const raw_t raw = reinterpret_cast<const raw_t*>(p)[part];
      const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < kPer; ++i) out[part * kPer + i] = to_float(elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

// p[i] = T(values[i]) for i < min(valid, N), rounded to nearest even.
template <int N, typename T>
__device__ __forceinline__ void store_floats(T* p, int64_t valid, bool aligned, const float (&values)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T)) < 16 ? N * static_cast<int>(sizeof(T)) : 16;
  constexpr int kPer = kBytes / static_cast<int>(sizeof(T));
  using raw_t = typename RawBits<kBytes>::type;
  if (aligned && valid >= N) {
#pragma unroll
    for (int part = 0; part < N / kPer; ++part) {
      raw_t raw;
      T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
      for (int i = 0; i < kPer; ++i) elements[i] = from_float<T>(values[part * kPer + i]);
      reinterpret_cast<raw_t*>(p)[part] = raw;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) p[i] = from_float<T>(values[i]);
    }
  }
}

// The same for four floats that are not used again soon: the lines are the first to leave the caches. kWhole:
// runs are whole and aligned, so that only `valid` <= 0 is not; such a load leaves `out` as it is.
template <bool kWhole>
__device__ __forceinline__ void load_once(const float* p, int64_t valid, float (&out)[4]) {
  if constexpr (kWhole) {
    if (valid <= 0) return;
    const float4 raw = __ldcs(reinterpret_cast<const float4*>(p));
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  } else {
    load_floats(p, valid, false, out);
  }
}

template <bool kWhole>
__device__ __forceinline__ void store_once(float* p, int64_t valid, const float (&values)[4]) {
  if constexpr (kWhole) {
    if (valid <= 0) return;
    __stcs(reinterpret_cast<float4*>(p), make_float4(values[0], values[1], values[2], values[3]));
  } else {
    store_floats(p, valid, false, values);
  }
}

// The first `valid` of 16 bytes at any address, zero beyond.
__device__ __forceinline__ uint4 load_bytes_16(const void* address, int64_t valid) {
  const uint8_t* bytes = static_cast<const uint8_t*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < valid) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// store_floats for int8 values that already are in range.
template <int N>
__device__ __forceinline__ void store_int8(int8_t* p, int64_t valid, bool aligned, const int (&values)[N]) {
  using raw_t = typename RawBits<N>::type;
  if (aligned && valid >= N) {
    raw_t raw;
    int8_t* elements = reinterpret_cast<int8_t*>(&raw);
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = static_cast<int8_t>(values[i]);
    *reinterpret_cast<raw_t*>(p) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) p[i] = static_cast<int8_t>(values[i]);
    }
  }
}

}  // namespace bitnet_ext::cuda
