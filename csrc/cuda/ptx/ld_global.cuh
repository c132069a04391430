// Loads with a cache hint.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// 16 bytes that this kernel reads exactly once: they skip L1, which keeps the activations, and stay in L2
// like any other line, because the weights of a small model fit there from one token to the next.
__device__ __forceinline__ uint4 load_once_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The same for fp32 numbers, issued where this stands among other volatile instructions. Where not `valid`,
// nothing is read and the numbers are zeros.
__device__ __forceinline__ float4 load_once_float4(const float* address, bool valid) {
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
      : "l"(address), "r"(static_cast<int>(valid)));
  return v;
}

__device__ __forceinline__ float2 load_once_float2(const float* address) {
  float2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(address));
  return v;
}

// The first `valid` of two neighbours.
__device__ __forceinline__ float2 load_once_up_to_2(const float* address, int valid) {
  float2 v = make_float2(0.0f, 0.0f);
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.gt.s32 p, %3, 1;\n"
      "setp.eq.s32 q, %3, 1;\n"
      "@p ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];\n"
      "@q ld.global.nc.L1::no_allocate.f32 %0, [%2];\n"
      "}\n"
      : "+f"(v.x), "+f"(v.y)
      : "l"(address), "r"(valid));
  return v;
}

__device__ __forceinline__ float load_once_float(const float* address, bool valid) {
  float v = 0.0f;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.nc.L1::no_allocate.f32 %0, [%1];\n"
      "}\n"
      : "+f"(v)
      : "l"(address), "r"(static_cast<int>(valid)));
  return v;
}

}  // namespace bitnet_ext::cuda
