// What surrounds the rows of csrc/cuda/cross_entropy.cu: the number of targets, the mean over tokens, the sum
// of the predicted distributions, and the scale of finished gradients.
//
// Counting and averaging take one block each: T values and a few microseconds. The distributions are summed
// over slices of rows, a vector of columns a thread, which reads the logits once more and in order; the
// caller adds the slices. All sums have a fixed order.
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax_math.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/cross_entropy.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kBlockThreads = 1024;

__global__ void __launch_bounds__(kBlockThreads)
    count_targets_kernel(const int64_t* __restrict__ target, int64_t T, float* __restrict__ count) {
  __shared__ int64_t scratch[kBlockThreads / 32];
  int64_t kept = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < T; i += kBlockThreads) kept += target[i] >= 0;
  kept = block_sum<kBlockThreads>(kept, scratch);
  if (threadIdx.x == 0) *count = static_cast<float>(kept);
}

__global__ void __launch_bounds__(kBlockThreads)
    mean_kernel(const __grid_constant__ CrossEntropyMeanArgs args) {
  constexpr int kSums = 5;
  __shared__ double scratch[kSums][kBlockThreads / 32];
  double sums[kSums] = {};  // targets, cross-entropy, entropy, lse - mean logit, lse^2
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < args.T; i += kBlockThreads) {
    if (args.target[i] < 0) continue;  // also keeps a NaN of an ignored row out
    const double lse = static_cast<double>(args.lse[i]);
    sums[0] += 1.0;
    sums[1] += static_cast<double>(args.cross_entropy[i]);
    sums[2] += static_cast<double>(args.entropy[i]);
    sums[3] += static_cast<double>(args.smoothing[i]);
    sums[4] += lse * lse;
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) scratch[k][threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(scratch[k][threadIdx.x]);
  const double cross_entropy = sums[1] / sums[0];  // NaN without a target
  const double entropy = sums[2] / sums[0], smoothing = sums[3] / sums[0], square = sums[4] / sums[0];
  if (threadIdx.x != 0) return;
  const Objective& o = args.objective;
  const double s = static_cast<double>(o.label_smoothing);
  double loss = (1.0 - s) * cross_entropy + static_cast<double>(o.z_loss) * square -
                static_cast<double>(o.entropy_weight) * entropy;
  if (s != 0.0) loss += s * smoothing;
  if (args.marginal_entropy != nullptr) {
    loss -= static_cast<double>(o.diversity_weight) * static_cast<double>(*args.marginal_entropy);
  }
  if (args.square_sum != nullptr) loss += static_cast<double>(args.output_l2) * *args.square_sum;
  *args.loss = static_cast<float>(loss);
  *args.mean_cross_entropy = static_cast<float>(cross_entropy);
  *args.mean_entropy = static_cast<float>(entropy);
  *args.mean_square = static_cast<float>(square);
}

constexpr int kColumnThreads = 128;

// A thread sums one vector of columns over the rows of a slice.
template <typename scalar_t>
__global__ void __launch_bounds__(kColumnThreads) probability_sums_kernel(const LogitRows logits,
                                                                          const int64_t* __restrict__ target,
                                                                          const float* __restrict__ lse,
                                                                          float softcap,
                                                                          float* __restrict__ sums) {
  using Math = RowMath<scalar_t>;
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * kVec;
  if (j >= logits.V) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kProbabilityRows;
  const int64_t end = min(begin + kProbabilityRows, logits.T);
  const scalar_t* z = static_cast<const scalar_t*>(logits.data) + j;
  float total[kVec] = {};
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) {
    if (target[i] < 0) continue;
    const float row_lse = lse[i];
    float values[kVec];
    unpack(__ldg(reinterpret_cast<const uint4*>(z + i * logits.stride)),
           values);  // padding is there to be read
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (softcap != 0.0f) values[e] = Math::capped(values[e], softcap, 1.0f / softcap);
      total[e] += Math::exponential((values[e] - row_lse) * (1.0f / Math::kUnit));
    }
  }
  store_floats(sums + static_cast<int64_t>(blockIdx.y) * logits.V + j,
               logits.V - j,
               is_aligned(sums, 16) && logits.V % 4 == 0,
               total);
}

template <typename scalar_t>
__device__ __forceinline__ void scale_tensor(void* data, int64_t numel, float scale) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  scalar_t* x = static_cast<scalar_t*>(data);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kVec;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < numel;
       i += step) {
    float values[kVec];
    load_floats(x + i, numel - i, true, values);
#pragma unroll
    for (int e = 0; e < kVec; ++e) values[e] *= scale;
    store_floats(x + i, numel - i, true, values);
  }
}

__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ ScaleArgs args) {
  const float scale = *args.scale;
  if (scale == 1.0f) return;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    switch (args.dtype[t]) {
      case DType::kBFloat16:
        scale_tensor<__nv_bfloat16>(args.data[t], args.numel[t], scale);
        break;
      case DType::kFloat16:
        scale_tensor<__half>(args.data[t], args.numel[t], scale);
        break;
      case DType::kFloat32:
        scale_tensor<float>(args.data[t], args.numel[t], scale);
        break;
    }
  }
}

}  // namespace

cudaError_t launch_count_targets(const int64_t* target, int64_t T, float* count, cudaStream_t stream) {
  count_targets_kernel<<<1, kBlockThreads, 0, stream>>>(target, T, count);
  return cudaGetLastError();
}

cudaError_t launch_cross_entropy_mean(const CrossEntropyMeanArgs& args, cudaStream_t stream) {
  mean_kernel<<<1, kBlockThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_probability_sums(const LogitRows& logits,
                                    const int64_t* target,
                                    const float* lse,
                                    float softcap,
                                    float* sums,
                                    cudaStream_t stream) {
  if (logits.T == 0) return cudaSuccess;
  const int64_t slices = ceil_div(logits.T, kProbabilityRows);
  if (slices > 65535) return cudaErrorInvalidConfiguration;
  const bool bf16 = logits.dtype == DType::kBFloat16;
  const int64_t columns = kColumnThreads * (bf16 ? 8 : 4);
  const dim3 grid(static_cast<unsigned>(ceil_div(logits.V, columns)), static_cast<unsigned>(slices));
  const auto kernel = bf16 ? probability_sums_kernel<__nv_bfloat16> : probability_sums_kernel<float>;
  kernel<<<grid, kColumnThreads, 0, stream>>>(logits, target, lse, softcap, sums);
  return cudaGetLastError();
}

cudaError_t launch_scale(const ScaleArgs& args, int num_sms, cudaStream_t stream) {
  scale_kernel<<<static_cast<unsigned>(8 * num_sms), 256, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace bitnet_ext::cuda
