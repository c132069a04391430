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
  int parts;  // blocks, a cluster, that share the contraction of a tile of grad_x: 1, from sm_90 on also 2 or
              // 4
};

// Two parts for a contraction of more than four steps of 16 a warp, where they find free multiprocessors.
// What the exchange costs is 0.8 us: for M = 128, K = 256 on an H200 N = 768 falls from 5.8 to 5.2 us and N =
// 1,024 from 7.1 to 6.1, but N = 256 would rise from 2.9 to 3.6; four parts gain nothing more.
inline int small_grad_parts(int64_t M, int64_t N, int64_t K, int num_sms) {
  const int64_t tiles = (M + 15) / 16 * ((K + 63) / 64);
  return N > 512 && 2 * tiles <= num_sms ? 2 : 1;
}

cudaError_t launch_small_grad(const SmallGradArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
