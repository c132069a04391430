// norm_backward.cuh for many rows of up to 8,192 values in whole chunks: the same formula and Policies.
//
// What bounds it is memory, if enough loads are under way: 30 to 40 KB on a multiprocessor. A thread has one
// chunk of 8 columns, so that its gain and its part of grad_gain are 8 registers each, and kAtOnce rows of
// it: their loads are issued together, and one barrier joins the sums of all of them. A block takes a run of
// rows; add_row_blocks_kernel adds the blocks' parts of grad_gain.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_chunk.cuh"
#include "cuda/norm_backward.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {

// kMaxThreads: of a block, which has a thread for every chunk of a row and whole warps.
template <int kMaxThreads_, int kMinBlocks_, int kAtOnce_, int kWords_>
struct ManyRowsShape {
  static constexpr int kMaxThreads = kMaxThreads_, kMinBlocks = kMinBlocks_, kAtOnce = kAtOnce_;
  static constexpr int kWords = kWords_;  // of a chunk: 4 where all tensors are of 16 bits, else 8
  static constexpr bool kWhole = true;
};

// Blocks a multiprocessor must hold. What fits three blocks' registers on sm_90 spills 12 bytes on sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename Shape>
inline constexpr int kManyRowsBlocks = Shape::kMinBlocks > 2 ? 2 : Shape::kMinBlocks;
#else
template <typename Shape>
inline constexpr int kManyRowsBlocks = Shape::kMinBlocks;
#endif

template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, kManyRowsBlocks<Shape>) norm_backward_many_kernel(
    const __grid_constant__ typename Policy::Args args, int rows_per_block, float inverse_K, float* parts) {
  constexpr int kAtOnce = Shape::kAtOnce, kMaxWarps = Shape::kMaxThreads / 32;
  __shared__ float scratch[2][kAtOnce][kMaxWarps];
  const NormBackwardArgs& norm = args.norm;
  const int64_t K = norm.K;
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int k = static_cast<int>(threadIdx.x) * kChunk;
  const bool has_columns = k < K;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t end = min(begin + rows_per_block, norm.M);
  wait_for_previous_kernel();
  allow_next_kernel();

  float gains[kChunk], sums[kChunk] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) gains[i] = 1.0f;
  if (norm.gain != nullptr && has_columns) load_vector<true>(norm.gain, k, K, gains);
  int turn = 0;
  for (int64_t first = begin; first < end; first += kAtOnce, turn ^= 1) {
    typename Policy::template Raw<Shape> raw[kAtOnce];
    Chunk<true, Shape::kWords> grad[kAtOnce];
    float rstd[kAtOnce], dot[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      rstd[r] = dot[r] = 0.0f;
      if (first + r >= end || !has_columns) continue;
      grad[r].load(norm.grad_y, first + r, k, K);
      raw[r].load(args, first + r, k);
      rstd[r] = norm.rstd[first + r];
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (first + r < end && has_columns) {
        float t[kChunk], h[kChunk];
        grad[r].unpack(norm.grad_y.dtype, t);
        Policy::template value<Shape>(args, raw[r], h);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          t[i] *= h[i] * rstd[r];
          sums[i] += t[i];
          dot[r] = fmaf(t[i], gains[i], dot[r]);
        }
      }
      dot[r] = warp_sum(dot[r]);
    }
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) scratch[turn][r][warp] = dot[r];
    }
    __syncthreads();  // one a turn: what is written next is the other half
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const float mean = warp_sum(lane < warps ? scratch[turn][r][lane] : 0.0f) * inverse_K;
      if (first + r >= end || !has_columns) continue;
      grad[r].forget_unpacked();
      raw[r].forget_unpacked();
      float g[kChunk], h[kChunk];
      grad[r].unpack(norm.grad_y.dtype, g);
      Policy::template value<Shape>(args, raw[r], h);
      const float factor = rstd[r] * mean;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) g[i] = rstd[r] * (g[i] * gains[i] - h[i] * factor);
      Policy::template finish<Shape>(args, raw[r], first + r, k, g);
    }
  }
  if (parts != nullptr && has_columns) {
    store_floats(parts + static_cast<int64_t>(blockIdx.x) * K + k, kChunk, true, sums);
  }
}

// Rows of up to this many values take the kernel above. Longer ones leave a multiprocessor one block of it.
template <typename Policy>
constexpr int64_t longest_many_row(bool narrow) {
  return !narrow ? 2560 : Policy::kDivides ? 4096 : 8192;
}

// `narrow`: all tensors are of 16 bits. At most max_blocks parts of grad_gain; returns their number.
template <typename Policy>
cudaError_t launch_norm_backward_many(const typename Policy::Args& args,
                                      bool narrow,
                                      int64_t max_blocks,
                                      int64_t* row_blocks,
                                      cudaStream_t stream) {
  const NormBackwardArgs& norm = args.norm;
  const auto launch = [&](auto shape, int64_t resident) {
    using Shape = decltype(shape);
    const int64_t rows_per_block = ceil_div(norm.M, std::min(max_blocks, resident));
    *row_blocks = ceil_div(norm.M, rows_per_block);
    return launch_kernel(norm_backward_many_kernel<Policy, Shape>,
                         dim3(static_cast<unsigned>(*row_blocks)),
                         dim3(static_cast<unsigned>(ceil_div(norm.K / kChunk, 32) * 32)),
                         0,
                         stream,
                         norm.dependent_launch,
                         args,
                         static_cast<int>(rows_per_block),
                         1.0f / static_cast<float>(norm.K),
                         norm.grad_gain != nullptr ? norm.partials : nullptr);
  };
  // A division wants more registers than the others' blocks leave.
  constexpr bool kDivides = Policy::kDivides;
  if (narrow) {
    if (norm.K <= 2048) return launch(ManyRowsShape < 256, kDivides ? 2 : 3, 2, 4 > {}, 512);
    if (kDivides || norm.K <= 4096) return launch(ManyRowsShape < 512, kDivides ? 1 : 2, 1, 4 > {}, 264);
    if constexpr (!kDivides) return launch(ManyRowsShape<1024, 1, 1, 4>{}, 132);
  }
  if (norm.K <= 2048) return launch(ManyRowsShape < 256, kDivides ? 2 : 3, 1, 8 > {}, 512);
  return launch(ManyRowsShape<512, 1, 1, 8>{}, 264);
}

}  // namespace bitnet_ext::cuda
