// The squares of many tensors: their sum, and the gradient clipping of a training step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// A tensor has at most this many partial sums, so that one block adds them up in a microsecond or two.
constexpr int64_t kMaxSquarePartials = 1024;

// Elements of each partial sum but the last of a tensor, a multiple of a vector.
constexpr int64_t square_run(int64_t numel) {
  const int64_t wanted = (numel + kMaxSquarePartials - 1) / kMaxSquarePartials;
  return wanted <= 4096 ? 4096 : (wanted + 7) / 8 * 8;
}

constexpr int64_t square_partials(int64_t numel) {
  return (numel + square_run(numel) - 1) / square_run(numel);
}

// The table travels in the kernel's parameters, which hold 4 KB on every toolkit and driver: no copy to the
// device, nothing to keep alive, and a captured graph replays it. A block finds its tensor by its number.
struct SquareSumTable {
  static constexpr int kMaxTensors = 128;
  const void* data[kMaxTensors];
  int64_t numel[kMaxTensors];
  uint32_t block_end[kMaxTensors];  // first block beyond the tensor, over the whole launch
  uint8_t dtype[kMaxTensors];       // DType
  int count;
};

// partials[i] = sum of the squares of block i of the table's tensors.
cudaError_t launch_square_sums(const SquareSumTable& table,
                               double* partials,
                               bool dependent,
                               cudaStream_t stream);

// out = partials[0] + partials[1] + ... in a fixed order; 0 when there is none.
cudaError_t launch_add_partials(const double* partials, int64_t count, double* out, cudaStream_t stream);

struct ClipTable {
  static constexpr int kMaxTensors = 960;
  uint32_t partials_end[kMaxTensors];  // of the tensor and all before it in this table
  int count;
};

// The latch is what clip_gradients_ keeps from step to step, float64 [2 + tensors]: the step whose norm was
// the first not to be finite (negative: none), a counter that is 0 between launches, the sums of that step.
struct ClipArgs {
  const double* partials;  // of the table's first tensor
  const double* known;     // those of tensor `known_tensor`, of which `partials` holds none; else null
  int64_t known_tensor;
  int64_t num_known;
  double* square_sums;   // [tensors], workspace
  int64_t first_tensor;  // of the table
  int64_t tensors;       // of all tables; the last one finishes the clipping
  const int64_t* step;   // []
  float max_norm;        // Inf for no clipping
  double* latch;
  float* norm;        // []
  float* grad_scale;  // []: min(1, max_norm / (norm + 1e-6)), or NaN once the latch holds a step
};

cudaError_t launch_clip(const ClipTable& table, const ClipArgs& args, bool dependent, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
