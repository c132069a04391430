// Both gradients of a ternary layer for few tokens: csrc/cuda/small_grad.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

struct SmallGradArgs {
  const void* grad_y;  // [M, N] of grad_dtype
  DType grad_dtype;
  const int8_t* x_i8;             // [M, K]; not read without grad_weight
  const float* act_scale;         // [M]
  const uint32_t* weight;         // prepacked ternary [N, K], 16-byte aligned; not read without grad_x
  const float* weight_scale;      // [num_segments]
  int num_segments;               // 1 .. kMaxSegments
  int segment_end[kMaxSegments];  // first row beyond each segment, a multiple of 16; the last is N
  int M, N, K;
  void* grad_x;       // [M, K] of grad_dtype, or null
  void* grad_weight;  // [N, K] of weight_dtype, or null
  DType weight_dtype;
  bool dependent_launch;
};

cudaError_t launch_small_grad(const SmallGradArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
