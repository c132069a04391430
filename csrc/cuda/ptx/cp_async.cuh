// Asynchronous copies from global to shared memory (sm_80 and newer).
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// 16 bytes, past L1 (".cg"): a tile is read once by this block. Both addresses must be multiples of 16.
// With `valid` false nothing is read and the destination is filled with zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(bytes)
               : "memory");
}

// The first `bytes` of 16, 0 to 16, and zeros behind them.
__device__ __forceinline__ void cp_async_16_bytes(void* shared, const void* global, int bytes) {
  const uint32_t destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are unfinished. What they copied is then visible to
// this thread; a barrier makes it visible to the others.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace bitnet_ext::cuda
