// Gradients of two RMS norms one behind the other, and of a sum in front of them: norm_pair.h's formula.
//
//   grad_y = gradient of z = norm(y) at grad_z, rounded to x's type                  [M, K], in registers
//   grad_x = gradient of y = norm(s) at grad_y, + grad_residual                      [M, K]
//   grad_gain = sum over rows of grad_z * yhat,  grad_first_gain = sum of grad_y * shat  [K]
//
// The arithmetic is that of common/norm_backward.cuh, twice, and y is computed again from s. A warp has a
// row; blocks of 32 columns read the columns again and sum up the gains' gradients. These need one number of
// each row that only the whole row gives, mean_k(grad_z * gain * yhat). Its bits are the signal: the row's
// warp stores them, inverted, for every column block into a word that was zero, and the column block waits
// for that and makes it zero again. Row blocks wait for nothing, and the up to 16 column blocks leave them
// room on any device. Bound by latency: a trip to memory, and from the first rows' means to the columns.
#include "cuda/common/launch.cuh"
#include "cuda/common/norm_backward.cuh"
#include "cuda/norm_pair.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;  // of a block, a warp each
static_assert(kNormPairColumns == kGainColumns && gain_row_blocks(kMaxNormPairM) == 1);

// A word of zeros would be no signal: the NaN that is all ones, which arithmetic does not give, becomes
// another.
__device__ __forceinline__ void signal(uint32_t* flag, float mean) {
  const uint32_t word = ~__float_as_uint(mean);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(word == 0 ? 1u : word) : "memory");
}

// The means of the rows first, first + step, .. below M, asked for together.
template <int kUnder>
__device__ __forceinline__ void wait_for_means(
    const uint32_t* flags, int64_t first, int step, int64_t M, float (&means)[kUnder]) {
  bool all;
  do {
    all = true;
    uint32_t words[kUnder];
#pragma unroll
    for (int i = 0; i < kUnder; ++i) {
      const int64_t row = first + i * step;
      words[i] = 1;
      if (row >= M) continue;
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[i]) : "l"(flags + row) : "memory");
    }
#pragma unroll
    for (int i = 0; i < kUnder; ++i) {
      all &= words[i] != 0;
      means[i] = __uint_as_float(~words[i]);
    }
  } while (!all);
}

// y of the forward.
__device__ __forceinline__ void normed(
    DType dtype, const float (&s)[kChunk], float rstd, const float (&gains)[kChunk], float (&y)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) y[i] = __fmul_rn(__fmul_rn(s[i], rstd), gains[i]);
  round_to(dtype, y);
}

__device__ __forceinline__ void scale(float (&v)[kChunk], const float (&gains)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = __fmul_rn(v[i], gains[i]);
}

// mean_k(grad * gain * hhat) of the row of this warp.
template <int kSlots>
__device__ __forceinline__ float row_mean(const float (&grad)[kSlots][kChunk],
                                          const float (&h)[kSlots][kChunk],
                                          float rstd,
                                          const float (&gains)[kSlots][kChunk],
                                          int lane,
                                          int64_t K) {
  float dot = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if ((lane + 32 * s) * kChunk >= K) continue;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dot = __fadd_rn(dot, __fmul_rn(gain_term(grad[s][i], h[s][i], rstd), gains[s][i]));
    }
  }
  return static_cast<float>(warp_sum(static_cast<double>(dot)) / static_cast<double>(K));
}

template <int kSlots>
__device__ __forceinline__ void norm_pair_row(const NormPairBackwardArgs& args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t K = args.K;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int64_t>(threadIdx.x) / 32;
  if (row >= args.M) return;
  const bool has_residual = args.grad_residual.base != nullptr;

  Chunk<true, 8> grad_chunk[kSlots], x_chunk[kSlots], residual_chunk[kSlots];
  float first_gains[kSlots][kChunk], gains[kSlots][kChunk];
  const float first_rstd = args.first_rstd[row], rstd = args.rstd[row];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = (lane + 32 * s) * kChunk;
    if (k >= K) continue;
    grad_chunk[s].load(args.grad_z, row, k, K);
    x_chunk[s].load(args.x, row, k, K);
    if (has_residual) residual_chunk[s].load(args.grad_residual, row, k, K);
    load_vector<true>(args.first_gain, k, K, first_gains[s]);
    load_vector<true>(args.gain, k, K, gains[s]);
  }
  float grad[kSlots][kChunk], x[kSlots][kChunk], y[kSlots][kChunk];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if ((lane + 32 * s) * kChunk >= K) continue;
    grad_chunk[s].unpack(args.grad_z.dtype, grad[s]);
    x_chunk[s].unpack(args.x.dtype, x[s]);
    normed(args.x.dtype, x[s], first_rstd, first_gains[s], y[s]);
  }

  const float mean = row_mean(grad, y, rstd, gains, lane, K);
  if (lane < ceil_div(K, kGainColumns)) signal(args.flags + lane * args.M + row, mean);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if ((lane + 32 * s) * kChunk >= K) continue;
    scale(grad[s], gains[s]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) grad[s][i] = norm_gradient(grad[s][i], y[s][i], rstd, mean);
    round_to(args.x.dtype, grad[s]);
  }

  const float first_mean = row_mean(grad, x, first_rstd, first_gains, lane, K);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = (lane + 32 * s) * kChunk;
    if (k >= K) continue;
    scale(grad[s], first_gains[s]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      grad[s][i] = norm_gradient(grad[s][i], x[s][i], first_rstd, first_mean);
    }
    if (has_residual) {
      float residual[kChunk];
      residual_chunk[s].unpack(args.grad_residual.dtype, residual);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) grad[s][i] = __fadd_rn(grad[s][i], residual[i]);
    }
    store_chunk<true>(args.grad_x, row, k, K, grad[s]);
    if (args.grad_delta.base != nullptr) store_chunk<true>(args.grad_delta, row, k, K, grad[s]);
  }
}

// 32 columns: 4 threads have 8 each, 64 groups of them every 64th row, two rows under way at once, as in
// norm_backward_columns, whose order of the sums this is.
__device__ __forceinline__ void norm_pair_columns(const NormPairBackwardArgs& args, int64_t block) {
  constexpr int kWide = kGainColumns / kChunk, kLanes = kThreads / kWide, kUnder = 2;
  constexpr int kWarps = kThreads / 32;
  __shared__ float parts[2][kWarps][kGainColumns];
  const int64_t K = args.K;
  const int lane = static_cast<int>(threadIdx.x) / kWide, chunk = static_cast<int>(threadIdx.x) % kWide;
  const int64_t k = block * kGainColumns + chunk * kChunk;
  uint32_t* flags = args.flags + block * args.M;
  float first_sum[kChunk] = {}, sum[kChunk] = {};
  if (k < K) {
    float first_gains[kChunk], gains[kChunk];
    load_vector<true>(args.first_gain, k, K, first_gains);
    load_vector<true>(args.gain, k, K, gains);
    for (int64_t first = lane; first < args.M; first += kUnder * kLanes) {
      Chunk<true, 8> grad_chunk[kUnder], x_chunk[kUnder];
      float first_rstd[kUnder] = {}, rstd[kUnder] = {};
#pragma unroll
      for (int i = 0; i < kUnder; ++i) {
        const int64_t row = first + i * kLanes;
        if (row >= args.M) continue;
        grad_chunk[i].load(args.grad_z, row, k, K);
        x_chunk[i].load(args.x, row, k, K);
        first_rstd[i] = args.first_rstd[row];
        rstd[i] = args.rstd[row];
      }
      float grad[kUnder][kChunk], x[kUnder][kChunk], y[kUnder][kChunk];
#pragma unroll
      for (int i = 0; i < kUnder; ++i) {
        if (first + i * kLanes >= args.M) continue;
        grad_chunk[i].unpack(args.grad_z.dtype, grad[i]);
        x_chunk[i].unpack(args.x.dtype, x[i]);
        normed(args.x.dtype, x[i], first_rstd[i], first_gains, y[i]);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum[j] = add_gain_term(sum[j], grad[i][j], y[i][j], rstd[i]);
        scale(grad[i], gains);
      }
      float means[kUnder];
      wait_for_means(flags, first, kLanes, args.M, means);
#pragma unroll
      for (int i = 0; i < kUnder; ++i) {
        if (first + i * kLanes >= args.M) continue;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) grad[i][j] = norm_gradient(grad[i][j], y[i][j], rstd[i], means[i]);
        round_to(args.x.dtype, grad[i]);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          first_sum[j] = add_gain_term(first_sum[j], grad[i][j], x[i][j], first_rstd[i]);
        }
      }
    }
  }
  __syncwarp();  // the threads of a row have all read its word
  if (chunk == 0) {
    for (int64_t row = lane; row < args.M; row += kLanes) flags[row] = 0;
  }
  // The 8 groups of a warp, then the warps in order.
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
#pragma unroll
    for (int offset = 16; offset >= kWide; offset >>= 1) {
      first_sum[j] += __shfl_xor_sync(kFullWarp, first_sum[j], offset);
      sum[j] += __shfl_xor_sync(kFullWarp, sum[j], offset);
    }
    if (threadIdx.x % 32 < kWide) {
      parts[0][warp][chunk * kChunk + j] = first_sum[j];
      parts[1][warp][chunk * kChunk + j] = sum[j];
    }
  }
  __syncthreads();
  const int of = warp, column = static_cast<int>(threadIdx.x) % kGainColumns;
  if (of < 2 && block * kGainColumns + column < K) {
    float total = parts[of][0][column];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total += parts[of][i][column];
    (of == 0 ? args.grad_first_gain : args.grad_gain)[block * kGainColumns + column] = total;
  }
}

template <int kSlots>
__global__ void __launch_bounds__(kThreads)
    norm_pair_backward_kernel(const __grid_constant__ NormPairBackwardArgs args, unsigned row_blocks) {
  wait_for_previous_kernel();
  allow_next_kernel();
  if (blockIdx.x < row_blocks) {
    norm_pair_row<kSlots>(args);
  } else {
    norm_pair_columns(args, blockIdx.x - row_blocks);
  }
}

}  // namespace

cudaError_t launch_norm_pair_backward(const NormPairBackwardArgs& args, cudaStream_t stream) {
  if (args.K > kMaxNormPairK || args.K % kChunk != 0 || args.M > kMaxNormPairM) return cudaErrorInvalidValue;
  const auto row_blocks = static_cast<unsigned>(ceil_div(args.M, kRows));
  const auto kernel = args.K <= 256 ? norm_pair_backward_kernel<1> : norm_pair_backward_kernel<2>;
  return launch_kernel(kernel,
                       dim3(row_blocks + static_cast<unsigned>(norm_pair_column_blocks(args.K))),
                       dim3(kThreads),
                       0,
                       stream,
                       args.dependent_launch,
                       args,
                       row_blocks);
}

}  // namespace bitnet_ext::cuda
