// Statistics of a softmax over the rows of [T, V] logits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct SoftmaxStatsArgs {
  const void* logits;  // [T, V] of `dtype`
  DType dtype;
  const int64_t* target;  // [T]
  int64_t T, V;
  double* lse;          // [T] each
  float* target_logit;  // 0 where the target is negative, NaN where it is V or more
  float* mean_logit;
  float* expected_logit;
  int64_t* argmax;
};

cudaError_t launch_softmax_stats(const SoftmaxStatsArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
