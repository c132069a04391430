// The gradient of an embedding as rows: only tokens that occurred have one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

struct RowGradientArgs {
  const int64_t* ids;  // [T], 0 <= id < V
  const float* rows;   // [T, H]
  int64_t T, H, V;
  float* sums;     // [T, H]
  int32_t* slots;  // [V]
  bool aligned;    // rows and sums are multiples of 16 and H of 4
};

// sums[t] = the sum of all rows of id ids[t] if t is its first occurrence, else 0; slots[id] = that t, or -1
// for an id that does not occur.
cudaError_t launch_sum_rows(const RowGradientArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
