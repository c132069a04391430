// Global memory brought to L2 ahead of its use. Nothing is read by the kernel, so this may stand in front of
// wait_for_previous_kernel: a line that is written later is written in L2.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// `bytes`, a multiple of 16, from `global`, a multiple of 16 (sm_90).
__device__ __forceinline__ void prefetch_bulk(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

}  // namespace bitnet_ext::cuda
