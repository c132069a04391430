// Clusters of blocks, which read each other's shared memory (sm_90 and newer).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

// Every thread of the cluster: what was written to shared memory before is visible to all of them after.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// The 16 bytes that lie at `shared` in the block of that rank.
__device__ __forceinline__ float4 load_cluster_16(const void* shared, uint32_t rank) {
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

}  // namespace bitnet_ext::cuda
