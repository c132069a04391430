// One Adam step over many tensors, and the sum of squares that gradient clipping needs.
//
//   g = grad * grad_scale;   coupled decay: g += wd * p;   decoupled decay: p *= 1 - lr * wd
//   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   p -= (lr / bc1) * m / (sqrt(v) / sqrt(bc2) + eps)
//
// Bound by memory: 16 bytes read and 12 written an element, once. A block handles 4,096 elements of one
// tensor, 16 a thread in four 16-byte accesses of each array. lr, the decay and the bias corrections are read
// from the device, so that a captured graph can be replayed with other values.
//
// The squares are summed in fp64, where squares of fp32 are exact, over fixed blocks and then in one order:
// equal tensors give equal bits.
#include "cuda/adam.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 4;
static_assert(kElementsPerBlock % (kThreads * kVec) == 0,
              "a thread makes the same number of steps in any block");
static_assert(sizeof(SquareSumTable) + 64 <= 4096, "kernel parameters hold 4 KB");
static_assert(sizeof(AdamTable) + sizeof(AdamSettings) <= 4096, "kernel parameters hold 4 KB");

// The tensor that owns this block: the first with block_end beyond it.
template <typename Table>
__device__ __forceinline__ int find_tensor(const Table& table, uint32_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (block < table.block_end[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <typename scalar_t>
__device__ __forceinline__ double square_sum(const void* data, int64_t begin, int64_t numel) {
  const scalar_t* tensor = static_cast<const scalar_t*>(data);
  const bool aligned = is_aligned(tensor, kVec * sizeof(scalar_t));
  double sum = 0.0;
#pragma unroll
  for (int step = 0; step < kElementsPerBlock / (kThreads * kVec); ++step) {
    const int64_t i = begin + (step * kThreads + static_cast<int>(threadIdx.x)) * kVec;
    float values[kVec];
    load_floats(tensor + i, numel - i, aligned, values);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      sum = fma(static_cast<double>(values[j]), static_cast<double>(values[j]), sum);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const __grid_constant__ SquareSumTable table, double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  const int t = find_tensor(table, blockIdx.x);
  const uint32_t first_block = t == 0 ? 0 : table.block_end[t - 1];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - first_block) * kElementsPerBlock;
  double sum;
  switch (static_cast<DType>(table.dtype[t])) {
    case DType::kBFloat16:
      sum = square_sum<__nv_bfloat16>(table.data[t], begin, table.numel[t]);
      break;
    case DType::kFloat16:
      sum = square_sum<__half>(table.data[t], begin, table.numel[t]);
      break;
    default:
      sum = square_sum<float>(table.data[t], begin, table.numel[t]);
  }
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

constexpr int kAddThreads = 1024;

__global__ void __launch_bounds__(kAddThreads)
    add_partials_kernel(const double* __restrict__ partials, int64_t count, double* __restrict__ out) {
  __shared__ double scratch[kAddThreads / 32];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kAddThreads) sum += partials[i];
  sum = block_sum<kAddThreads>(sum, scratch);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void __launch_bounds__(kThreads)
    adam_step_kernel(const __grid_constant__ AdamTable table, const __grid_constant__ AdamSettings settings) {
  const int t = find_tensor(table, blockIdx.x);
  const uint32_t first_block = t == 0 ? 0 : table.block_end[t - 1];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - first_block) * kElementsPerBlock;
  const int64_t numel = table.numel[t];
  const bool aligned = table.aligned[t];

  const float lr = settings.hyper[0];
  const float weight_decay = settings.hyper[1];
  const float step_size = lr / settings.hyper[2];
  const float sqrt_correction = sqrtf(settings.hyper[3]);
  const float grad_scale = *settings.grad_scale;
  const float coupled_decay = settings.decay && !settings.decoupled ? weight_decay : 0.0f;
  const float keep = settings.decay && settings.decoupled ? fmaf(-lr, weight_decay, 1.0f) : 1.0f;

#pragma unroll 2
  for (int step = 0; step < kElementsPerBlock / (kThreads * kVec); ++step) {
    const int64_t i = begin + (step * kThreads + static_cast<int>(threadIdx.x)) * kVec;
    if (i >= numel) break;
    const int64_t valid = numel - i;
    float p[kVec], g[kVec], m[kVec], v[kVec];
    load_floats(table.param[t] + i, valid, aligned, p);
    load_floats(table.grad[t] + i, valid, aligned, g);
    load_floats(table.exp_avg[t] + i, valid, aligned, m);
    load_floats(table.exp_avg_sq[t] + i, valid, aligned, v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float grad = g[j] * grad_scale + coupled_decay * p[j];
      m[j] = settings.beta1 * m[j] + settings.one_minus_beta1 * grad;
      v[j] = settings.beta2 * v[j] + settings.one_minus_beta2 * (grad * grad);
      const float denominator = sqrtf(v[j]) / sqrt_correction + settings.eps;
      p[j] = p[j] * keep - step_size * (m[j] / denominator);
    }
    store_floats(table.param[t] + i, valid, aligned, p);
    store_floats(table.exp_avg[t] + i, valid, aligned, m);
    store_floats(table.exp_avg_sq[t] + i, valid, aligned, v);
  }
}

}  // namespace

cudaError_t launch_square_sums(const SquareSumTable& table, double* partials, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  square_sums_kernel<<<table.block_end[table.count - 1], kThreads, 0, stream>>>(table, partials);
  return cudaGetLastError();
}

cudaError_t launch_add_partials(const double* partials, int64_t count, double* out, cudaStream_t stream) {
  add_partials_kernel<<<1, kAddThreads, 0, stream>>>(partials, count, out);
  return cudaGetLastError();
}

cudaError_t launch_adam_step(const AdamTable& table, const AdamSettings& settings, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  adam_step_kernel<<<table.block_end[table.count - 1], kThreads, 0, stream>>>(table, settings);
  return cudaGetLastError();
}

}  // namespace bitnet_ext::cuda
