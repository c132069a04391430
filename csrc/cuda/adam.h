// Multi-tensor optimiser kernels: the global sum of squares and one Adam step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// A table of tensors travels in the kernel's parameters, which hold 4 KB on every toolkit and driver: no copy
// to the device, nothing to keep alive, and a captured graph replays it. A block finds its tensor by its
// number.
constexpr int kElementsPerBlock = 4096;

constexpr int64_t blocks_of(int64_t numel) {
  return (numel + kElementsPerBlock - 1) / kElementsPerBlock;
}

struct SquareSumTable {
  static constexpr int kMaxTensors = 128;
  const void* data[kMaxTensors];
  int64_t numel[kMaxTensors];
  uint32_t block_end[kMaxTensors];  // first block beyond the tensor, over the whole launch
  uint8_t dtype[kMaxTensors];       // DType
  int count;
};

// partials[i] = sum of the squares of block i of the table's tensors.
cudaError_t launch_square_sums(const SquareSumTable& table, double* partials, cudaStream_t stream);

// out = partials[0] + partials[1] + ... in a fixed order; 0 when there is none.
cudaError_t launch_add_partials(const double* partials, int64_t count, double* out, cudaStream_t stream);

struct AdamTable {
  static constexpr int kMaxTensors = 72;
  float* param[kMaxTensors];
  const float* grad[kMaxTensors];
  float* exp_avg[kMaxTensors];
  float* exp_avg_sq[kMaxTensors];
  int64_t numel[kMaxTensors];
  uint32_t block_end[kMaxTensors];
  uint8_t aligned[kMaxTensors];  // all four pointers are multiples of 16
  int count;
};

struct AdamSettings {
  const float* hyper;       // [4]: lr, weight_decay, 1 - beta1^t, 1 - beta2^t, read on the device
  const float* grad_scale;  // []
  float beta1, beta2;
  float one_minus_beta1, one_minus_beta2;  // rounded once, from fp64
  float eps;
  bool decoupled, decay;
};

cudaError_t launch_adam_step(const AdamTable& table, const AdamSettings& settings, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
