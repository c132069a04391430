// Gradients of the RMS norm.
//
//   g = grad_y * gain,  xhat = x * rstd
//   grad_x    = rstd * (g - xhat * mean_k(g * xhat))          [M, K]
//   grad_gain = sum over rows of grad_y * xhat                [K]
//
// grad_x: one block a row, which is read twice, the second time from L1 or L2. grad_gain: a thread owns a
// column inside a block of at most 256 rows; the sums of several row blocks are added in order by a second
// launch. No atomics: equal inputs give equal bits. Bound by memory.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/rms_norm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kVec = 4;  // elements a thread loads at once: 16 bytes of fp32, 8 of the 16-bit types

template <typename grad_t, typename scalar_t>
__global__ void __launch_bounds__(kRowThreads) rms_norm_grad_x_kernel(const grad_t* __restrict__ grad_y,
                                                                      const scalar_t* __restrict__ x,
                                                                      const float* __restrict__ gain,
                                                                      const float* __restrict__ rstd,
                                                                      int64_t K,
                                                                      scalar_t* __restrict__ grad_x) {
  __shared__ double scratch[kRowThreads / 32];
  const int64_t row = blockIdx.x;
  const grad_t* grad_row = grad_y + row * K;
  const scalar_t* x_row = x + row * K;
  scalar_t* out_row = grad_x + row * K;
  const float row_rstd = rstd[row];
  const bool grad_aligned = is_aligned(grad_row, kVec * sizeof(grad_t));
  const bool x_aligned = is_aligned(x_row, kVec * sizeof(scalar_t));
  const bool out_aligned = is_aligned(out_row, kVec * sizeof(scalar_t));
  const bool gain_aligned = is_aligned(gain, 16);

  const auto load = [&](int64_t k, float(&g)[kVec], float(&xhat)[kVec]) {
    load_floats(grad_row + k, K - k, grad_aligned, g);
    load_floats(x_row + k, K - k, x_aligned, xhat);
    float gains[kVec];
    if (gain != nullptr) load_floats(gain + k, K - k, gain_aligned, gains);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (gain != nullptr) g[i] *= gains[i];
      xhat[i] *= row_rstd;
    }
  };

  float dot = 0.0f;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kVec; k < K; k += kRowThreads * kVec) {
    float g[kVec], xhat[kVec];
    load(k, g, xhat);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dot += g[i] * xhat[i];
  }
  const double total = block_sum<kRowThreads>(static_cast<double>(dot), scratch);
  const float mean = static_cast<float>(total / static_cast<double>(K));

  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kVec; k < K; k += kRowThreads * kVec) {
    float g[kVec], xhat[kVec];
    load(k, g, xhat);
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] = row_rstd * (g[i] - xhat[i] * mean);
    store_floats(out_row + k, K - k, out_aligned, g);
  }
}

constexpr int kGainColumns = 32;
constexpr int kGainLanes = 8;  // rows a block reads at once

template <typename grad_t, typename scalar_t>
__global__ void __launch_bounds__(kGainColumns* kGainLanes)
    rms_norm_grad_gain_kernel(const grad_t* __restrict__ grad_y,
                              const scalar_t* __restrict__ x,
                              const float* __restrict__ rstd,
                              int64_t M,
                              int64_t K,
                              int64_t rows_per_block,
                              uint32_t column_blocks,
                              float* __restrict__ sums) {  // [row blocks, K]
  __shared__ float lanes[kGainLanes][kGainColumns];
  const int column = threadIdx.x % kGainColumns, lane = threadIdx.x / kGainColumns;
  const int64_t k = static_cast<int64_t>(blockIdx.x % column_blocks) * kGainColumns + column;
  const int64_t row_block = blockIdx.x / column_blocks;
  const int64_t begin = row_block * rows_per_block;
  const int64_t end = min(begin + rows_per_block, M);

  float sum = 0.0f;
  if (k < K) {
#pragma unroll 4
    for (int64_t row = begin + lane; row < end; row += kGainLanes) {
      sum += to_float(grad_y[row * K + k]) * (to_float(x[row * K + k]) * rstd[row]);
    }
  }
  lanes[lane][column] = sum;
  __syncthreads();
  if (lane == 0 && k < K) {
#pragma unroll
    for (int i = 1; i < kGainLanes; ++i) sum += lanes[i][column];
    sums[row_block * K + k] = sum;
  }
}

__global__ void __launch_bounds__(kRowThreads) add_row_blocks_kernel(const float* __restrict__ partials,
                                                                     int64_t row_blocks,
                                                                     int64_t K,
                                                                     float* __restrict__ grad_gain) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (k >= K) return;
  double sum = 0.0;
  for (int64_t i = 0; i < row_blocks; ++i) sum += static_cast<double>(partials[i * K + k]);
  grad_gain[k] = static_cast<float>(sum);
}

template <typename grad_t, typename scalar_t>
cudaError_t launch(const RmsNormBackwardArgs& args, cudaStream_t stream) {
  const grad_t* grad_y = static_cast<const grad_t*>(args.grad_y);
  const scalar_t* x = static_cast<const scalar_t*>(args.x);
  if (args.M > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (args.M > 0) {
    rms_norm_grad_x_kernel<grad_t, scalar_t><<<static_cast<unsigned>(args.M), kRowThreads, 0, stream>>>(
        grad_y, x, args.gain, args.rstd, args.K, static_cast<scalar_t*>(args.grad_x));
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  if (args.grad_gain == nullptr) return cudaSuccess;

  // M = 0 still launches: the sum over no rows is 0.
  const int64_t row_blocks = gain_row_blocks(args.M);
  const int64_t rows_per_block = ceil_div(args.M, row_blocks);
  const int64_t column_blocks = ceil_div(args.K, kGainColumns);
  if (row_blocks * column_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  rms_norm_grad_gain_kernel<grad_t, scalar_t>
      <<<static_cast<unsigned>(row_blocks * column_blocks), kGainColumns * kGainLanes, 0, stream>>>(
          grad_y,
          x,
          args.rstd,
          args.M,
          args.K,
          rows_per_block,
          static_cast<uint32_t>(column_blocks),
          row_blocks == 1 ? args.grad_gain : args.partials);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess || row_blocks == 1) return status;
  add_row_blocks_kernel<<<static_cast<unsigned>(ceil_div(args.K, kRowThreads)), kRowThreads, 0, stream>>>(
      args.partials, row_blocks, args.K, args.grad_gain);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_rms_norm_backward(const RmsNormBackwardArgs& args, cudaStream_t stream) {
  return dispatch_dtype(args.grad_dtype, [&](auto grad_tag) {
    return dispatch_dtype(args.x_dtype, [&](auto x_tag) {
      return launch<typename decltype(grad_tag)::type, typename decltype(x_tag)::type>(args, stream);
    });
  });
}

}  // namespace bitnet_ext::cuda
