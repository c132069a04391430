// A launch over many tensors, whose table travels in the kernel's parameters.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// The entry that owns item i: the first whose end lies beyond it.
template <int kMax>
__device__ __forceinline__ int find_entry(const uint32_t (&ends)[kMax], int count, uint32_t i) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (i < ends[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace bitnet_ext::cuda
