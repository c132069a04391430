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

}  // namespace bitnet_ext::cuda
