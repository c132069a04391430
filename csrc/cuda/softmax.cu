// One pass over each row of logits for the statistics of its softmax.
//
//   lse = log sum_j exp(z_j),  mean = sum_j z_j / V,  expected = sum_j p_j z_j,  argmax        z [T, V]
//
// Bound by memory: each logit is read once. V of a language model is odd (50,257), so rows start at any
// element: the elements before the first 16-byte boundary and after the last one are handled one by one, the
// rest in 16-byte accesses.
//
// The sums are online: a thread keeps m, the largest logit so far, s = sum exp(z - m) and
// e = sum exp(z - m) (z - m); two such triples with m1 < m2 combine as
//   s = s1 exp(m1 - m2) + s2,   e = exp(m1 - m2) (e1 + (m1 - m2) s1) + e2,   and expected = m + e / s.
// The order of combination is fixed by the block size: equal rows give equal bits.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/softmax.h"

namespace bitnet_ext::cuda {
namespace {

// A row as [head scalars][whole 16-byte vectors][tail scalars].
template <typename scalar_t>
struct RowSplit {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  int64_t head, vectors, tail_begin;

  __device__ __forceinline__ RowSplit(const scalar_t* row, int64_t V) {
    const unsigned misaligned =
        static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(scalar_t));
    head = min(static_cast<int64_t>((kVec - misaligned) % kVec), V);
    vectors = (V - head) / kVec;
    tail_begin = head + vectors * kVec;
  }
};

struct RowStats {
  float max, sum, shifted;  // m, s, e of the header
  float total;              // sum of z
  int64_t argmax;
};

__device__ __forceinline__ RowStats empty_stats() {
  return {-INFINITY, 0.0f, 0.0f, 0.0f, INT64_MAX};
}

// Folds in the logits values[0 .. count), which stand at j, j + 1, ...
template <int kCount>
__device__ __forceinline__ void accumulate(RowStats& stats, const float (&values)[kCount], int64_t j) {
  float largest = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, values[i]);
  if (largest > stats.max) {
    const float shift = stats.max - largest;  // -inf at first
    const float factor = expf(shift);
    stats.shifted = factor > 0.0f ? factor * (stats.shifted + shift * stats.sum) : 0.0f;
    stats.sum *= factor;
    stats.max = largest;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      if (values[i] == largest) stats.argmax = j + i;
    }
  }
  // While every logit so far is -inf, -inf - (-inf) would be NaN; a base of 0 gives the weight 0 that is due.
  const float base = stats.max == -INFINITY ? 0.0f : stats.max;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float shift = values[i] - base;
    const float weight = expf(shift);
    stats.sum += weight;
    if (weight > 0.0f) stats.shifted += weight * shift;  // the limit of p log p at p = 0 is 0
    total += values[i];
  }
  stats.total += total;
}

struct CombinedStats {
  float max;
  double sum, shifted, total;
  int64_t argmax;
};

// Commutative bit for bit: both orders compute the same products and sums.
__device__ __forceinline__ CombinedStats combine(const CombinedStats& a, const CombinedStats& b) {
  const bool a_low = a.max < b.max;
  const double low_sum = a_low ? a.sum : b.sum, high_sum = a_low ? b.sum : a.sum;
  const double low_shifted = a_low ? a.shifted : b.shifted, high_shifted = a_low ? b.shifted : a.shifted;
  CombinedStats result;
  result.max = a_low ? b.max : a.max;
  const float shift = (a_low ? a.max : b.max) - result.max;
  double factor = 1.0, moved = low_shifted;
  if (a.max != b.max) {  // equal maxima include two empty halves at -inf, whose difference is NaN
    factor = static_cast<double>(expf(shift));
    moved = factor > 0.0 ? factor * (low_shifted + static_cast<double>(shift) * low_sum) : 0.0;
  }
  result.sum = factor * low_sum + high_sum;
  result.shifted = moved + high_shifted;
  result.total = a.total + b.total;
  result.argmax = a.max == b.max ? min(a.argmax, b.argmax) : a_low ? b.argmax : a.argmax;
  return result;
}

__device__ __forceinline__ CombinedStats shuffle_xor(const CombinedStats& v, int offset) {
  return {__shfl_xor_sync(kFullWarp, v.max, offset),
          __shfl_xor_sync(kFullWarp, v.sum, offset),
          __shfl_xor_sync(kFullWarp, v.shifted, offset),
          __shfl_xor_sync(kFullWarp, v.total, offset),
          __shfl_xor_sync(kFullWarp, v.argmax, offset)};
}

template <typename scalar_t, int kThreads>
__global__ void __launch_bounds__(kThreads) softmax_stats_kernel(const scalar_t* __restrict__ logits,
                                                                 const int64_t* __restrict__ target,
                                                                 int64_t V,
                                                                 double* __restrict__ lse,
                                                                 float* __restrict__ target_logit,
                                                                 float* __restrict__ mean_logit,
                                                                 float* __restrict__ expected_logit,
                                                                 int64_t* __restrict__ argmax) {
  using Split = RowSplit<scalar_t>;
  constexpr int kVec = Split::kVec;
  __shared__ CombinedStats warps[kThreads / 32];
  const int64_t row = blockIdx.x;
  const scalar_t* z = logits + row * V;
  const Split split(z, V);

  // Indices grow within a thread, so the first maximum a thread meets is its lowest.
  RowStats stats = empty_stats();
  if (threadIdx.x < split.head) {
    const float values[1] = {to_float(z[threadIdx.x])};
    accumulate(stats, values, threadIdx.x);
  }
#pragma unroll 2
  for (int64_t vector = threadIdx.x; vector < split.vectors; vector += kThreads) {
    const int64_t j = split.head + vector * kVec;
    float values[kVec];
    load_floats(z + j, kVec, true, values);
    accumulate(stats, values, j);
  }
  if (split.tail_begin + threadIdx.x < V) {
    const int64_t j = split.tail_begin + threadIdx.x;
    const float values[1] = {to_float(z[j])};
    accumulate(stats, values, j);
  }

  CombinedStats all{stats.max, stats.sum, stats.shifted, stats.total, stats.argmax};
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) all = combine(all, shuffle_xor(all, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  all = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : CombinedStats{-INFINITY, 0.0, 0.0, 0.0, INT64_MAX};
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) all = combine(all, shuffle_xor(all, offset));
  if (threadIdx.x != 0) return;

  lse[row] = static_cast<double>(all.max) + log(all.sum);
  mean_logit[row] = static_cast<float>(all.total / static_cast<double>(V));
  expected_logit[row] = static_cast<float>(static_cast<double>(all.max) + all.shifted / all.sum);
  argmax[row] = all.argmax == INT64_MAX ? 0 : all.argmax;  // a row of -inf or NaN only
  const int64_t y = target[row];
  target_logit[row] = y < 0 ? 0.0f : y < V ? to_float(z[y]) : __uint_as_float(0x7fffffffu);
}

template <typename scalar_t, int kThreads>
cudaError_t launch_stats(const SoftmaxStatsArgs& args, cudaStream_t stream) {
  softmax_stats_kernel<scalar_t, kThreads>
      <<<static_cast<unsigned>(args.T), kThreads, 0, stream>>>(static_cast<const scalar_t*>(args.logits),
                                                               args.target,
                                                               args.V,
                                                               args.lse,
                                                               args.target_logit,
                                                               args.mean_logit,
                                                               args.expected_logit,
                                                               args.argmax);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_softmax_stats(const SoftmaxStatsArgs& args, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  if (args.T > INT32_MAX) return cudaErrorInvalidConfiguration;
  // A row of a vocabulary alone must keep a multiprocessor busy; a short one is over in a few loads.
  constexpr int64_t kLongRow = 8192;
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    return args.V >= kLongRow ? launch_stats<scalar_t, 1024>(args, stream)
                              : launch_stats<scalar_t, 128>(args, stream);
  });
}

}  // namespace bitnet_ext::cuda
