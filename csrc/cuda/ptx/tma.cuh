// The bulk tensor copy engine (sm_90): tiles between global and shared memory, described by a tensor map.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace bitnet_ext::cuda {

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// The tile at (c0, c1), c0 the fastest coordinate; its bytes count towards the barrier's phase. What lies
// outside the tensor arrives as zeros.
__device__ __forceinline__ void tma_load_2d(
    void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t c0, int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(barrier)),
      "r"(c0),
      "r"(c1)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(
    void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t c0, int32_t c1, int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(barrier)),
      "r"(c0),
      "r"(c1),
      "r"(c2)
      : "memory");
}

// Writes a tile; elements outside the tensor are dropped.
__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map,
                                             const void* shared,
                                             int32_t c0,
                                             int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(shared)),
               "r"(c0),
               "r"(c1)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but kPending of this thread's stores have read their shared memory.
template <int kPending = 0>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until this thread's stores are done.
__device__ __forceinline__ void tma_store_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before later accesses of the copy engine.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace bitnet_ext::cuda
