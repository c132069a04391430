// The backward of an RMS norm y = (h * rstd) * gain over rows of anything, shared by rms_norm_backward.cu (h
// is the input) and glu_backward.cu (h is a gated product that is computed again).
//
//   g = grad_y * gain,  hhat = h * rstd
//   grad_h    = rstd * (g - hhat * mean_k(g * hhat))          handed to the Policy, which writes what follows
//   grad_gain = sum over rows of grad_y * hhat                [K]
//
// A row is read once and lives in registers. Many rows: a block takes a run of them and adds up its part of
// grad_gain on the way, in registers or, for long rows, in shared memory; a second launch adds the parts. Few
// rows (up to 512): blocks of the same launch, one for 32 columns, read the columns again from L2 and
// write grad_gain whole: one launch, no parts. The order of every sum depends on M and K only. No atomics.
//
// A Policy has: Args; Raw, the chunks of a row's slot, with load and load_value (only what h is made of);
// value, h of a slot; finish, which takes grad_h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/norm_backward_many.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_chunk.cuh"
#include "cuda/norm_backward.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {

struct NormBackwardPlan {
  int64_t rows_per_block;  // of the blocks that take rows
  uint32_t row_blocks;
  uint32_t column_blocks;         // 32 columns each
  int64_t rows_per_column_block;  // the columns of one block of rows
  float* sums;  // where row or column blocks put their part of grad_gain: [blocks of rows, K]
};

constexpr int kGainColumns = 32;

// The formulas a value at a time. Which products and sums are one operation is written out, because
// norm_pair_backward.cu must round as two launches of these kernels do.

// grad_y * hhat: what grad_gain sums up.
__device__ __forceinline__ float gain_term(float grad_y, float h, float rstd) {
  return __fmul_rn(grad_y, __fmul_rn(h, rstd));
}
__device__ __forceinline__ float add_gain_term(float sum, float grad_y, float h, float rstd) {
  return __fmaf_rn(grad_y, __fmul_rn(h, rstd), sum);
}
// grad_h, of g = grad_y * gain.
__device__ __forceinline__ float norm_gradient(float g, float h, float rstd, float mean) {
  return __fmul_rn(rstd, __fmaf_rn(-__fmul_rn(h, rstd), mean, g));
}

template <typename Policy, typename Shape>
__device__ __forceinline__ void norm_backward_rows(const typename Policy::Args& args,
                                                   const NormBackwardPlan& plan,
                                                   float* shared_sums) {
  const NormBackwardArgs& norm = args.norm;
  constexpr int kSlots = Shape::kSlots, kT = Shape::kThreadsPerRow;
  constexpr bool kWhole = Shape::kWhole;
  using Raw = typename Policy::template Raw<Shape>;
  using GradChunk = Chunk<kWhole, Shape::kWords>;
  constexpr bool kSharedSums = kSlots > 2;
  __shared__ double scratch[2 * (Shape::kThreads / 32)];
  const int group = static_cast<int>(threadIdx.x) / kT;
  const int64_t K = norm.K, k0 = static_cast<int64_t>(threadIdx.x % kT) * kChunk;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * plan.rows_per_block;
  const int64_t end = min(begin + plan.rows_per_block, norm.M);
  const bool sums_gain = !Shape::kLoops && plan.sums != nullptr && plan.column_blocks == 0;
  float sums[kSharedSums ? 1 : kSlots][kChunk] = {};
  if constexpr (kSharedSums) {
    for (int64_t k = threadIdx.x; k < K; k += Shape::kThreads) shared_sums[k] = 0.0f;
    __syncthreads();
  }

  // A thread with one chunk keeps its gains: they are under way with the row, not a trip to L2 behind it.
  constexpr bool kKeepsGain = kSlots == 1 && kWhole && !Shape::kLoops;
  float kept_gains[kChunk];
  const auto scale = [&](int64_t k, float(&v)[kChunk]) {  // by the gain
    if (norm.gain == nullptr) return;
    float gains[kChunk];
    if constexpr (!kKeepsGain) load_vector<kWhole>(norm.gain, k, K, gains);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = __fmul_rn(v[i], kKeepsGain ? kept_gains[i] : gains[i]);
  };

  const auto load_row = [&](int64_t row, Raw(&raw)[kSlots], GradChunk(&grad)[kSlots], float& rstd) {
    if (row >= end) return;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int64_t k = k0 + s * Shape::kStep;
      if (k >= K) continue;
      grad[s].load(norm.grad_y, row, k, K);
      raw[s].load(args, row, k);
    }
    if (norm.normalize) rstd = norm.rstd[row];
  };
  // The next row is under way while this one is computed, where there are registers for both.
  constexpr bool kAhead = kSlots * Shape::kWords <= 8 && kWhole && !Shape::kLoops;
  Raw next_raw[kAhead ? kSlots : 1];
  GradChunk next_grad[kAhead ? kSlots : 1];
  float next_rstd = 0.0f;
  if constexpr (kAhead) load_row(begin + group, next_raw, next_grad, next_rstd);
  if constexpr (kKeepsGain) {
    if (norm.gain != nullptr && k0 < K) load_vector<kWhole>(norm.gain, k0, K, kept_gains);
  }

  int turn = 0;
  for (int64_t first = begin; first < end; first += Shape::kRows, turn ^= 1) {
    const int64_t row = first + group;
    const bool live = row < end;
    Raw raw[kSlots];
    GradChunk grad[kSlots];
    float rstd = 0.0f, mean = 0.0f;
    if constexpr (kAhead) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) raw[s] = next_raw[s], grad[s] = next_grad[s];
      rstd = next_rstd;
      load_row(row + Shape::kRows, next_raw, next_grad, next_rstd);
    } else {
      load_row(row, raw, grad, rstd);
    }
    if (norm.normalize) {
      float dot = 0.0f;
      // grad_y * hhat, what grad_gain sums up; times the gain, what the mean does.
      const auto terms = [&](const GradChunk& grad_chunk, const Raw& raw_chunk, float(&t)[kChunk]) {
        float h[kChunk];
        grad_chunk.unpack(norm.grad_y.dtype, t);
        Policy::template value<Shape>(args, raw_chunk, h);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) t[i] = gain_term(t[i], h[i], rstd);
      };
      const auto add_to_dot = [&](int64_t k, float(&t)[kChunk]) {
        scale(k, t);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) dot = __fadd_rn(dot, t[i]);
      };
      if (live) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int64_t k = k0 + s * Shape::kStep;
          if (k >= K) continue;
          float t[kChunk];
          terms(grad[s], raw[s], t);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            if constexpr (kSharedSums) {
              shared_sums[k + i] += t[i];
            } else {
              sums[s][i] += t[i];
            }
          }
          add_to_dot(k, t);
        }
        if constexpr (Shape::kLoops) {
          for (int64_t k = k0 + kSlots * Shape::kStep; k < K; k += Shape::kStep) {
            GradChunk grad_chunk;
            Raw raw_chunk;
            float t[kChunk];
            grad_chunk.load(norm.grad_y, row, k, K);
            raw_chunk.load(args, row, k);
            terms(grad_chunk, raw_chunk, t);
            add_to_dot(k, t);
          }
        }
      }
      mean = static_cast<float>(chunk_row_sum<Shape>(static_cast<double>(dot), scratch, turn) /
                                static_cast<double>(K));
    }
    if (!live) continue;
    const auto finish_slot = [&](int64_t k, const GradChunk& grad_chunk, const Raw& raw_chunk) {
      float g[kChunk];
      grad_chunk.unpack(norm.grad_y.dtype, g);
      if (norm.normalize) {
        float h[kChunk];
        Policy::template value<Shape>(args, raw_chunk, h);
        scale(k, g);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) g[i] = norm_gradient(g[i], h[i], rstd, mean);
      }
      Policy::template finish<Shape>(args, raw_chunk, row, k, g);
    };
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int64_t k = k0 + s * Shape::kStep;
      if (k < K) finish_slot(k, grad[s], raw[s]);
    }
    if constexpr (Shape::kLoops) {
      for (int64_t k = k0 + kSlots * Shape::kStep; k < K; k += Shape::kStep) {
        GradChunk grad_chunk;
        Raw raw_chunk;
        grad_chunk.load(norm.grad_y, row, k, K);
        raw_chunk.load(args, row, k);
        finish_slot(k, grad_chunk, raw_chunk);
      }
    }
  }
  if (!sums_gain) return;

  float* out = plan.sums + static_cast<int64_t>(blockIdx.x) * K;
  if constexpr (kSharedSums) {
    __syncthreads();
    for (int64_t k = threadIdx.x; k < K; k += Shape::kThreads) out[k] = shared_sums[k];
  } else {
    // The groups' sums in order.
    __shared__ float parts[Shape::kRows > 1 ? Shape::kThreads * kSlots * kChunk : 1];
    if constexpr (Shape::kRows > 1) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          parts[(s * kChunk + i) * Shape::kThreads + threadIdx.x] = sums[s][i];
        }
      }
      __syncthreads();
      if (group != 0) return;
      for (int other = 1; other < Shape::kRows; ++other) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            sums[s][i] += parts[(s * kChunk + i) * Shape::kThreads + other * kT + threadIdx.x];
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int64_t k = k0 + s * Shape::kStep;
      if (k < K) store_floats(out + k, K - k, kWhole, sums[s]);
    }
  }
}

// Columns of a run of rows, read again: 4 threads have 8 columns each, 64 groups of them (128 in a block of
// 512) every 64th row. Two rows are under way at once: with 128 rows that is all, one trip to L2.
template <typename Policy, typename Shape>
__device__ __forceinline__ void norm_backward_columns(const typename Policy::Args& args,
                                                      const NormBackwardPlan& plan,
                                                      uint32_t block) {
  const NormBackwardArgs& norm = args.norm;
  using Raw = typename Policy::template Raw<Shape>;
  constexpr int kWide = kGainColumns / kChunk, kLanes = Shape::kThreads / kWide, kUnder = 2;
  constexpr int kWarps = Shape::kThreads / 32;
  __shared__ float parts[kWarps][kGainColumns];
  const int64_t K = norm.K, columns_wide = ceil_div(K, kGainColumns);
  const int lane = static_cast<int>(threadIdx.x) / kWide, chunk = static_cast<int>(threadIdx.x) % kWide;
  const int64_t k = block % columns_wide * kGainColumns + chunk * kChunk;
  const int64_t row_block = block / columns_wide;
  const int64_t begin = row_block * plan.rows_per_column_block;
  const int64_t end = min(begin + plan.rows_per_column_block, norm.M);
  float sum[kChunk] = {};
  if (k < K) {
    for (int64_t first = begin + lane; first < end; first += kUnder * kLanes) {
      Chunk<Shape::kWhole, Shape::kWords> grad[kUnder];
      Raw raw[kUnder];
      float rstd[kUnder] = {};
#pragma unroll
      for (int i = 0; i < kUnder; ++i) {
        const int64_t row = first + i * kLanes;
        if (row >= end) continue;
        grad[i].load(norm.grad_y, row, k, K);
        raw[i].load_value(args, row, k);
        rstd[i] = norm.rstd[row];
      }
#pragma unroll
      for (int i = 0; i < kUnder; ++i) {
        if (first + i * kLanes >= end) continue;
        float g[kChunk], h[kChunk];
        grad[i].unpack(norm.grad_y.dtype, g);
        Policy::template value<Shape>(args, raw[i], h);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum[j] = add_gain_term(sum[j], g[j], h[j], rstd[i]);
      }
    }
  }
  // The 8 groups of a warp, then the warps in order.
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
#pragma unroll
    for (int offset = 16; offset >= kWide; offset >>= 1) sum[j] += __shfl_xor_sync(kFullWarp, sum[j], offset);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 < kWide) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) parts[warp][chunk * kChunk + j] = sum[j];
  }
  __syncthreads();
  const int64_t column = block % columns_wide * kGainColumns + threadIdx.x;
  if (threadIdx.x < kGainColumns && column < K) {
    float total = parts[0][threadIdx.x];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total += parts[i][threadIdx.x];
    plan.sums[row_block * K + column] = total;
  }
}

template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    norm_backward_kernel(const __grid_constant__ typename Policy::Args args,
                         const __grid_constant__ NormBackwardPlan plan) {
  extern __shared__ float shared_sums[];
  wait_for_previous_kernel();
  allow_next_kernel();
  if (blockIdx.x < plan.row_blocks) {
    norm_backward_rows<Policy, Shape>(args, plan, shared_sums);
  } else {
    norm_backward_columns<Policy, Shape>(args, plan, blockIdx.x - plan.row_blocks);
  }
}

constexpr int kAddLanes = 32;

// grad_gain[k] = sum over the blocks of rows, in order of the lane and then of the lanes.
static __global__ void __launch_bounds__(kGainColumns* kAddLanes)
    add_row_blocks_kernel(const float* parts, int64_t row_blocks, int64_t K, float* grad_gain) {
  __shared__ float lanes[kAddLanes][kGainColumns];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int column = threadIdx.x % kGainColumns, lane = static_cast<int>(threadIdx.x) / kGainColumns;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kGainColumns + column;
  float sum = 0.0f;
  if (k < K) {
#pragma unroll 4
    for (int64_t i = lane; i < row_blocks; i += kAddLanes) sum += parts[i * K + k];
  }
  lanes[lane][column] = sum;
  __syncthreads();
  if (lane == 0 && k < K) {
    double total = 0.0;
    for (int i = 0; i < kAddLanes; ++i) total += static_cast<double>(lanes[i][column]);
    grad_gain[k] = static_cast<float>(total);
  }
}

inline cudaError_t launch_add_row_blocks(const NormBackwardArgs& norm,
                                         int64_t row_blocks,
                                         cudaStream_t stream) {
  return launch_kernel(add_row_blocks_kernel,
                       dim3(static_cast<unsigned>(ceil_div(norm.K, kGainColumns))),
                       dim3(kGainColumns * kAddLanes),
                       0,
                       stream,
                       norm.dependent_launch,
                       norm.partials,
                       row_blocks,
                       norm.K,
                       norm.grad_gain);
}

// `whole`, `narrow`: of all tensors of the Policy.
template <typename Policy>
cudaError_t launch_norm_backward(const typename Policy::Args& args,
                                 bool whole,
                                 bool narrow,
                                 cudaStream_t stream) {
  const NormBackwardArgs& norm = args.norm;
  const bool wants_gain = norm.grad_gain != nullptr;
  whole &= chunks_aligned(norm.grad_y, norm.K) && reinterpret_cast<uintptr_t>(norm.gain) % 16 == 0;
  narrow &= element_bytes(norm.grad_y.dtype) == 2;
  const int64_t gain_blocks = gain_row_blocks(norm.M);
  if (gain_blocks > 1 && norm.normalize && whole && norm.K <= longest_many_row<Policy>(narrow)) {
    int64_t row_blocks = 0;
    const cudaError_t status =
        launch_norm_backward_many<Policy>(args, narrow, gain_blocks, &row_blocks, stream);
    return status != cudaSuccess || !wants_gain ? status : launch_add_row_blocks(norm, row_blocks, stream);
  }
  return dispatch_chunk_shape<true>(norm.K, whole, narrow, [&](auto shape) {
    using Shape = decltype(shape);
    NormBackwardPlan plan = {};
    const int64_t columns_wide = ceil_div(norm.K, kGainColumns);
    int64_t row_blocks = 0, column_blocks = 0;
    if (gain_blocks == 1 || Shape::kLoops || !wants_gain) {
      plan.rows_per_block = Shape::kRows;
      plan.rows_per_column_block = norm.M > 0 ? ceil_div(norm.M, gain_blocks) : 1;
      row_blocks = ceil_div(norm.M, plan.rows_per_block);
      if (wants_gain) column_blocks = columns_wide * gain_blocks;
    } else {
      plan.rows_per_block = ceil_div(norm.M, gain_blocks);
      row_blocks = gain_blocks;
    }
    if (row_blocks + column_blocks == 0) return cudaSuccess;
    if (row_blocks + column_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    plan.row_blocks = static_cast<uint32_t>(row_blocks);
    plan.column_blocks = static_cast<uint32_t>(column_blocks);
    if (wants_gain) plan.sums = gain_blocks == 1 ? norm.grad_gain : norm.partials;
    const size_t shared_bytes = Shape::kSlots > 2 ? static_cast<size_t>(norm.K) * sizeof(float) : size_t{0};
    const auto kernel = norm_backward_kernel<Policy, Shape>;
    if (shared_bytes > 32 * 1024) {
      const cudaError_t status = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
      if (status != cudaSuccess) return status;
    }
    cudaError_t status = launch_kernel(kernel,
                                       dim3(static_cast<unsigned>(row_blocks + column_blocks)),
                                       dim3(Shape::kThreads),
                                       shared_bytes,
                                       stream,
                                       norm.dependent_launch,
                                       args,
                                       plan);
    if (status != cudaSuccess || !wants_gain || gain_blocks == 1) return status;
    return launch_add_row_blocks(norm, gain_blocks, stream);
  });
}

}  // namespace bitnet_ext::cuda
