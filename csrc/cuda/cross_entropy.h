// The objective over rows of logits: statistics, and the gradient written over the logits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// Rows of a vocabulary of V as they lie in memory: `stride` elements apart, 16-byte aligned, float32 or
// bfloat16.
struct LogitRows {
  void* data;
  DType dtype;
  int64_t T, V, stride;
};

// The terms of bitnet_ext/ops/loss.py. softcap 0: none.
struct Objective {
  float label_smoothing, z_loss, entropy_weight, diversity_weight, softcap;
};

struct CrossEntropyRowsArgs {
  LogitRows logits;           // overwritten by the gradient, padding by zeros, when `count` is given
  const int64_t* target;      // [T]; negative: ignored
  const float* count;         // [1], targets that are not ignored; null: statistics only
  const float* log_marginal;  // [V], 16-byte aligned, or null
  Objective objective;
  float *lse, *cross_entropy, *entropy, *smoothing;  // [T]
  int64_t* argmax;                                   // [T]
};

// `shared_limit`: bytes of shared memory that a block may use.
cudaError_t launch_cross_entropy_rows(const CrossEntropyRowsArgs& args,
                                      int num_sms,
                                      size_t shared_limit,
                                      cudaStream_t stream);

// count[0] = targets that are not negative.
cudaError_t launch_count_targets(const int64_t* target, int64_t T, float* count, cudaStream_t stream);

struct CrossEntropyMeanArgs {
  const float *lse, *cross_entropy, *entropy, *smoothing;  // [T]
  const int64_t* target;                                   // [T]
  const float* marginal_entropy;                           // [1] or null
  const double* square_sum;                                // [1], of the weight, or null
  int64_t T;
  Objective objective;
  float output_l2;
  float *loss, *mean_cross_entropy, *mean_entropy, *mean_square;  // [1]
};

cudaError_t launch_cross_entropy_mean(const CrossEntropyMeanArgs& args, cudaStream_t stream);

constexpr int kProbabilityRows = 32;  // that one sum of launch_probability_sums covers

// sums[s, j] = sum of p_ij over the rows i of slice s that are not ignored; sums is [ceil(T / 32), V].
cudaError_t launch_probability_sums(const LogitRows& logits,
                                    const int64_t* target,
                                    const float* lse,
                                    float softcap,
                                    float* sums,
                                    cudaStream_t stream);

// x *= scale[0] for up to two contiguous, 16-byte aligned tensors; nothing is touched when scale is 1.
struct ScaleArgs {
  void* data[2];
  DType dtype[2];
  int64_t numel[2];
  const float* scale;
};

cudaError_t launch_scale(const ScaleArgs& args, int num_sms, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
