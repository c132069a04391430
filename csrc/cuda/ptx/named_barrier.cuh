// Barriers among some of a block's threads.
#pragma once

namespace bitnet_ext::cuda {

// A barrier among `threads` threads, whole warps, apart from __syncthreads (id 0). id: 1 .. 15.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace bitnet_ext::cuda
