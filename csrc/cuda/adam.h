// One Adam step over many tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/quantize_weight.h"
#include "pending_steps.h"

namespace bitnet_ext::cuda {

// The table travels in the kernel's parameters, as in grad_norm.h.
struct AdamTable {
  static constexpr int kMaxTensors = 72;
  enum Flag : uint8_t {
    kAligned = 1,  // all four pointers are multiples of 16, and so is a row of a gradient by rows
    kDecay = 2,    // weight decay applies
    kTernary = 4,  // the sums of |param| are wanted
    kRows = 8,     // the gradient is that of some rows: AdamSettings::slots
  };
  float* param[kMaxTensors];
  const float* grad[kMaxTensors];
  float* exp_avg[kMaxTensors];
  float* exp_avg_sq[kMaxTensors];
  int64_t numel[kMaxTensors];
  uint32_t run[kMaxTensors];        // elements of a block: adam_run
  uint32_t block_end[kMaxTensors];  // first block beyond the tensor, over the whole launch
  uint32_t first_sum[kMaxTensors];  // where in abs_sums a ternary tensor's sums begin
  uint8_t flags[kMaxTensors];
  int count;
};

// A block handles the elements of one partial sum of |w| (quantize_weight.h), or 4,096 where none is wanted.
constexpr int64_t adam_run(int64_t numel, bool ternary) {
  return ternary ? absmean_run(numel) : 4096;
}
constexpr int64_t adam_blocks(int64_t numel, bool ternary) {
  return ternary ? absmean_partials(numel) : (numel + 4095) / 4096;
}

// What holds for every step.
struct AdamRule {
  float beta1, beta2;
  float one_minus_beta1, one_minus_beta2;  // rounded once, from fp64
  float eps;
  bool decoupled;
};

struct AdamSettings {
  AdamRule rule;
  const float* hyper;       // [4]: lr, weight_decay, 1 - beta1^t, 1 - beta2^t, read on the device
  const float* grad_scale;  // []; NaN leaves all tensors as they are
  const int32_t* slots;     // of the tensor with kRows: the row of grad for each row of param, or -1 for none
  uint32_t row_width;       // its columns
  uint32_t num_rows;        // of its grad; a slot beyond them is not read and makes that row of param NaN
  double* abs_sums;         // partial sums of the new |param| of ternary tensors, or null
};

cudaError_t launch_adam_step(const AdamTable& table,
                             const AdamSettings& settings,
                             bool dependent,
                             cudaStream_t stream);

// The same update of tensors without sums of |param| and without kRows, by `blocks` blocks (at least 1) that
// leave room on every multiprocessor for kernels of other streams.
cudaError_t launch_adam_beside(
    const AdamTable& table, const AdamSettings& settings, int blocks, bool dependent, cudaStream_t stream);

// The updates of an embedding [V, H] by `steps` steps, for which its rows wait.
struct AdamRowsArgs {
  AdamRule rule;
  float* param;                               // [V, H], and the moments like it
  float* exp_avg;                             // [V, H]
  float* exp_avg_sq;                          // [V, H]
  const float* grad[kMaxPendingSteps];        // [.., H] of each step; slots says whose rows these are
  const float* grad_scale[kMaxPendingSteps];  // [] of each step; from the first NaN on no update is made
  uint32_t num_rows[kMaxPendingSteps];        // of grad; a slot beyond them makes that row of param NaN
  const float* hyper;    // of each step four values as in AdamSettings, hyper_stride apart
  const int32_t* slots;  // [steps (+ 1 with ids), V]: the row of grad, or -1 for none
  const int64_t* ids;    // [T], of the next step, whose places are slots[steps]
  int64_t hyper_stride;
  int64_t T, H, V;
  int steps;
  bool decay;
  bool aligned;  // all pointers to floats but hyper are multiples of 16, and H of 4
};
// The rows of ids.
cudaError_t launch_adam_rows(const AdamRowsArgs& args, bool dependent, cudaStream_t stream);
// All rows, by `blocks` blocks as above, or 0 to fill the GPU.
cudaError_t launch_adam_all_rows(const AdamRowsArgs& args, int blocks, bool dependent, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
