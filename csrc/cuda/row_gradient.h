// The gradient of an embedding as rows: only tokens that occurred have one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

// slots[s, id] = the first place of id in ids[s], or -1 for an id that does not occur; ids [S, T], slots [S,
// V], S < 2^16.
cudaError_t launch_row_slots(
    const int64_t* ids, int64_t S, int64_t T, int64_t V, int32_t* slots, cudaStream_t stream);

struct RowGradientArgs {
  const int64_t* ids;    // [T], 0 <= id < V
  const float* rows;     // [T, H]
  const int32_t* slots;  // [V], of these ids
  int64_t T, H, V;
  float* sums;   // [T, H]
  bool aligned;  // rows and sums are multiples of 16 and H of 4
};

// sums[t] = the sum of all rows of id ids[t] if t is its first occurrence, else 0.
cudaError_t launch_sum_rows(const RowGradientArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
