// Reductions over a warp and a block. The order of the additions depends on the thread count only, so equal
// inputs give equal bits, and every thread gets the same bits.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Butterfly: both partners of a step add the same two numbers, and addition commutes bit for bit.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Every thread of the block must call these. `scratch` is shared memory of kThreads / 32 elements; it may be
// reused by the next call, hence the barrier in front.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  v = warp_sum(v);
  if constexpr (kThreads > 32) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) v += scratch[warp];
  }
  return v;
}

template <int kThreads>
__device__ __forceinline__ unsigned block_max(unsigned v, unsigned* scratch) {
  v = __reduce_max_sync(kFullWarp, v);
  if constexpr (kThreads > 32) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) v = max(v, scratch[warp]);
  }
  return v;
}

}  // namespace bitnet_ext::cuda
