// The objective of bitnet_ext/ops/loss.py over rows of logits z [T, V], and its gradient in their place.
//
//   lse = log sum_j exp(z_j),   H = lse - sum_j p_j z_j,   p_j = exp(z_j - lse),   argmax, and with n targets
//   z_j <- 1/n (p_j (1 + 2 z_loss lse + entropy_weight (log p_j + H) + diversity_weight (l_j - sum_k p_k
//   l_k))
//               - (1 - s) [j = target] - s / V)          s = label_smoothing, l = log_marginal
//   and with a cap c the logits are z_j = c tanh(raw_j / c), the gradient times 1 - (z_j / c)^2.
//
// Bound by memory: a row is read once and written once, 4 bytes a bfloat16 logit (4.2 TB/s: 1.57 ms for
// 32,768 rows of 50,257; the two exp of each logit take 0.9 ms of the special-function units beside it). For
// that a row stays in shared memory between its three passes: maximum (packed, while loading), sums,
// gradient. 100 KB of bfloat16 leave room for two blocks a multiprocessor, one of which loads or stores while
// the other computes; of a row beyond the limit the rest is read again, from L2. A thread reads back what it
// wrote itself, so the passes meet only in the two reductions.
//
// The rows start at 16-byte boundaries (the caller pads them), so all accesses are of 16 bytes; up to 7
// elements behind the last whole vector are handled one a thread, the padding is set to zero so that products
// may read it. Sums are fp32 within a thread and a warp, fp64 across warps, in a fixed order.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/cross_entropy.h"

namespace bitnet_ext::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// NaN when either is, unlike fmaxf.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// How each element type computes exp(z - max): `shift` is the argument in units of kUnit.
template <typename scalar_t>
struct RowMath;

template <>
struct RowMath<float> {
  static constexpr float kUnit = 1.0f;
  using Max = float;
  static __device__ __forceinline__ float base(float max) {
    return max;
  }
  static __device__ __forceinline__ float shift(float z, float base) {
    return z - base;
  }
  static __device__ __forceinline__ float exponential(float shift) {
    return expf(shift);
  }
  static __device__ __forceinline__ float capped(float raw, float cap) {
    return cap * tanhf(raw / cap);
  }
  static __device__ __forceinline__ Max no_max() {
    return -INFINITY;
  }
  static __device__ __forceinline__ Max vector_max(const uint4& v) {
    return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)),
                 fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
  static __device__ __forceinline__ Max larger(Max a, Max b) {
    return fmaxf(a, b);
  }
  static __device__ __forceinline__ float single(Max max) {
    return max;
  }
};

// Logits of 8 bits do not notice the 2^-22 of ex2.approx, nor that of a base rounded once a row, which p = e
// / sum cancels.
template <>
struct RowMath<__nv_bfloat16> {
  static constexpr float kUnit = kLn2;
  using Max = __nv_bfloat162;
  static __device__ __forceinline__ float base(float max) {
    return max * kLog2e;
  }
  static __device__ __forceinline__ float shift(float z, float base) {
    return fmaf(z, kLog2e, -base);
  }
  static __device__ __forceinline__ float exponential(float shift) {
    return exp2_fast(shift);
  }
  static __device__ __forceinline__ float capped(float raw, float cap) {
    const float x = __fdividef(raw, cap);
    return cap * (1.0f - __fdividef(2.0f, 1.0f + exp2_fast(2.0f * kLog2e * x)));
  }
  static __device__ __forceinline__ Max pair(uint32_t word) {
    return *reinterpret_cast<const __nv_bfloat162*>(&word);
  }
  static __device__ __forceinline__ Max no_max() {
    return pair(0xff80ff80u);
  }
  static __device__ __forceinline__ Max vector_max(const uint4& v) {
    return __hmax2(__hmax2(pair(v.x), pair(v.y)), __hmax2(pair(v.z), pair(v.w)));
  }
  static __device__ __forceinline__ Max larger(Max a, Max b) {
    return __hmax2(a, b);
  }
  static __device__ __forceinline__ float single(Max max) {
    return fmaxf(__low2float(max), __high2float(max));
  }
};

__device__ __forceinline__ void unpack(const uint4& v, float (&values)[4]) {
  values[0] = __uint_as_float(v.x);
  values[1] = __uint_as_float(v.y);
  values[2] = __uint_as_float(v.z);
  values[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&values)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ uint4 pack(const float (&values)[4]) {
  return make_uint4(__float_as_uint(values[0]),
                    __float_as_uint(values[1]),
                    __float_as_uint(values[2]),
                    __float_as_uint(values[3]));
}
__device__ __forceinline__ uint4 pack(const float (&values)[8]) {
  return make_uint4(pack_pair<__nv_bfloat16>(values[0], values[1]),
                    pack_pair<__nv_bfloat16>(values[2], values[3]),
                    pack_pair<__nv_bfloat16>(values[4], values[5]),
                    pack_pair<__nv_bfloat16>(values[6], values[7]));
}

// Sums of one thread, one warp or the row, of e_j = exp(z_j - max).
template <typename real_t>
struct RowSums {
  real_t e, shifted, total, marginal;  // sum of e_j, e_j shift_j, z_j, e_j l_j
  int argmax;
};

// What the gradient of a row needs, made by one thread for all.
struct RowCoefficients {
  float e_scale;  // of e_j alone, when kPlain
  float scale, inverse_sum, log_sum, coef, uniform, on_target;
};

template <typename scalar_t, bool kPlain>
struct RowPass {
  using Math = RowMath<scalar_t>;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  const CrossEntropyRowsArgs& args;
  float base;

  __device__ __forceinline__ float logit(float raw) const {
    if (kPlain || args.objective.softcap == 0.0f) return raw;
    return Math::capped(raw, args.objective.softcap);
  }
  // Not below -200, where exp is 0, so that a logit of -inf gives 0 and not 0 * inf; NaN stays.
  __device__ __forceinline__ float shift(float z) const {
    return max_or_nan(Math::shift(z, base), -200.0f);
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&raw)[kCount],
                                      const float* l,
                                      RowSums<float>& sums) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float z = logit(raw[i]);
      const float s = shift(z);
      const float e = Math::exponential(s);
      sums.e += e;
      sums.shifted = fmaf(e, s, sums.shifted);
      sums.total += z;
      if (!kPlain && l != nullptr) sums.marginal = fmaf(e, l[i], sums.marginal);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void gradient(const RowCoefficients& row,
                                           int64_t j,
                                           int64_t target,
                                           float (&values)[kCount]) const {
    const bool has_target = target >= j && target < j + kCount;
    const Objective& o = args.objective;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float z = logit(values[i]);
      const float s = kPlain ? Math::shift(z, base) : shift(z);
      const float e = Math::exponential(s);
      float grad;
      if constexpr (kPlain) {
        grad = fmaf(e, row.e_scale, -row.uniform);
      } else {
        float coef = fmaf(o.entropy_weight, s * Math::kUnit - row.log_sum, row.coef);
        if (args.log_marginal != nullptr) coef = fmaf(o.diversity_weight, args.log_marginal[j + i], coef);
        grad = fmaf(e * row.inverse_sum * row.scale, coef, -row.uniform);
      }
      if (has_target && j + i == target) grad -= row.on_target;
      if (!kPlain && o.softcap != 0.0f) {
        const float share = z / o.softcap;
        grad *= fmaf(-share, share, 1.0f);
      }
      values[i] = grad;
    }
  }
};

template <int kThreads>
struct RowScratch {
  float max[kThreads / 32];
  RowSums<float> sums[kThreads / 32];
  RowCoefficients row;
};

template <typename real_t>
__device__ __forceinline__ void warp_reduce(RowSums<real_t>& sums) {
  sums.e = warp_sum(sums.e);
  sums.shifted = warp_sum(sums.shifted);
  sums.total = warp_sum(sums.total);
  sums.marginal = warp_sum(sums.marginal);
  sums.argmax = __reduce_min_sync(kFullWarp, sums.argmax);
}

// Writes the statistics of a row and returns what its gradient needs.
__device__ __forceinline__ RowCoefficients finish_row(const CrossEntropyRowsArgs& args,
                                                      const RowSums<double>& sums,
                                                      float max,
                                                      float target_logit,
                                                      float unit,
                                                      int64_t i) {
  const Objective& o = args.objective;
  const double V = static_cast<double>(args.logits.V);
  const int64_t target = args.target[i];
  const double log_sum = log(sums.e);
  const double lse = static_cast<double>(max) + log_sum;
  const double entropy = log_sum - static_cast<double>(unit) * sums.shifted / sums.e;
  args.lse[i] = static_cast<float>(lse);
  args.cross_entropy[i] = target < 0 ? 0.0f : static_cast<float>(lse - static_cast<double>(target_logit));
  args.entropy[i] = static_cast<float>(entropy);
  args.smoothing[i] = static_cast<float>(lse - sums.total / V);
  args.argmax[i] = sums.argmax < args.logits.V ? sums.argmax : 0;  // a row of NaN only
  RowCoefficients row = {};
  if (args.count == nullptr) return row;
  // A target beyond the vocabulary cannot throw here: its NaN shows in the loss and in the gradient.
  row.scale = target < args.logits.V ? 1.0f / *args.count : __uint_as_float(0x7fffffffu);
  row.log_sum = static_cast<float>(log_sum);
  row.inverse_sum = static_cast<float>(1.0 / sums.e);
  double coef =
      1.0 + 2.0 * static_cast<double>(o.z_loss) * lse + static_cast<double>(o.entropy_weight) * entropy;
  if (args.log_marginal != nullptr) {
    coef -= static_cast<double>(o.diversity_weight) * sums.marginal / sums.e;
  }
  row.coef = static_cast<float>(coef);
  row.e_scale = static_cast<float>(coef / sums.e * static_cast<double>(row.scale));
  row.uniform = row.scale * o.label_smoothing / static_cast<float>(V);
  row.on_target = row.scale * (1.0f - o.label_smoothing);
  return row;
}

// Blocks a multiprocessor that the registers must allow: two of 512 threads, see above.
template <typename scalar_t, int kThreads, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    rows_kernel(const __grid_constant__ CrossEntropyRowsArgs args, int kept) {
  using Pass = RowPass<scalar_t, kPlain>;
  using Math = typename Pass::Math;
  constexpr int kVec = Pass::kVec;
  constexpr int kBatch = 4;  // 16-byte loads of a thread in flight
  extern __shared__ uint4 kept_row[];
  __shared__ RowScratch<kThreads> scratch;
  const int64_t row = blockIdx.x;
  const int64_t V = args.logits.V;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  scalar_t* z = static_cast<scalar_t*>(args.logits.data) + row * args.logits.stride;
  uint4* vectors = reinterpret_cast<uint4*>(z);
  const int count = static_cast<int>(V / kVec);
  const int64_t tail = static_cast<int64_t>(count) * kVec + thread;  // one element a thread
  const int64_t target = args.target[row];

  // Pass 1: into shared memory, and the largest raw logit.
  typename Math::Max packed_max = Math::no_max();
  for (int first = thread; first < count; first += kThreads * kBatch) {
    uint4 raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kThreads < count) raw[b] = vectors[first + b * kThreads];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int v = first + b * kThreads;
      if (v < count) {
        if (v < kept) kept_row[v] = raw[b];
        packed_max = Math::larger(packed_max, Math::vector_max(raw[b]));
      }
    }
  }
  float max = Math::single(packed_max);
  const float tail_raw[1] = {tail < V ? to_float(z[tail]) : 0.0f};
  if (tail < V) max = fmaxf(max, tail_raw[0]);
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, offset));
  if (lane == 0) scratch.max[warp] = max;
  // Read before the row is overwritten; NaN beyond the vocabulary.
  float target_raw = __uint_as_float(0x7fffffffu);
  if (thread == 0 && target >= 0 && target < V) target_raw = to_float(z[target]);
  __syncthreads();
  max = scratch.max[lane % (kThreads / 32)];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, offset));

  // Pass 2: the sums, and where the maximum stands.
  Pass pass{args, 0.0f};
  const float top = pass.logit(max);
  pass.base = Math::base(top);
  RowSums<float> sums = {0.0f, 0.0f, 0.0f, 0.0f, INT32_MAX};
  for (int v = thread; v < count; v += kThreads) {
    const uint4 raw = v < kept ? kept_row[v] : vectors[v];
    float values[kVec];
    unpack(raw, values);
    pass.add(values, args.log_marginal == nullptr ? nullptr : args.log_marginal + v * kVec, sums);
    if (Math::single(Math::vector_max(raw)) == max && sums.argmax == INT32_MAX) {
#pragma unroll
      for (int i = kVec - 1; i >= 0; --i) {
        if (values[i] == max) sums.argmax = v * kVec + i;
      }
    }
  }
  if (tail < V) {
    pass.add(tail_raw, args.log_marginal == nullptr ? nullptr : args.log_marginal + tail, sums);
    if (tail_raw[0] == max && sums.argmax == INT32_MAX) sums.argmax = static_cast<int>(tail);
  }
  warp_reduce(sums);
  if (lane == 0) scratch.sums[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    const RowSums<float> one =
        lane < kThreads / 32 ? scratch.sums[lane] : RowSums<float>{0.0f, 0.0f, 0.0f, 0.0f, INT32_MAX};
    RowSums<double> all = {one.e, one.shifted, one.total, one.marginal, one.argmax};
    warp_reduce(all);
    if (lane == 0) scratch.row = finish_row(args, all, top, pass.logit(target_raw), Math::kUnit, row);
  }
  if (args.count == nullptr) return;
  __syncthreads();

  // Pass 3: the gradient. An ignored row gets zeros whatever it holds.
  const RowCoefficients coefficients = scratch.row;
  if (target < 0) {
    for (int v = thread; v < count; v += kThreads) vectors[v] = make_uint4(0, 0, 0, 0);
  } else {
    for (int v = thread; v < count; v += kThreads) {
      float values[kVec];
      unpack(v < kept ? kept_row[v] : vectors[v], values);
      pass.gradient(coefficients, static_cast<int64_t>(v) * kVec, target, values);
      vectors[v] = pack(values);
    }
  }
  if (tail < V) {
    float value[1] = {tail_raw[0]};
    pass.gradient(coefficients, tail, target, value);
    z[tail] = from_float<scalar_t>(target < 0 ? 0.0f : value[0]);
  }
  for (int64_t j = V + thread; j < args.logits.stride; j += kThreads) z[j] = from_float<scalar_t>(0.0f);
}

template <typename scalar_t, int kThreads, bool kPlain>
cudaError_t launch_rows(const CrossEntropyRowsArgs& args, size_t shared_limit, cudaStream_t stream) {
  const auto kernel = rows_kernel<scalar_t, kThreads, kPlain>;
  const size_t room = shared_limit - sizeof(RowScratch<kThreads>) - 64;
  const size_t row_bytes = static_cast<size_t>(args.logits.V) * sizeof(scalar_t) / 16 * 16;
  const size_t shared = row_bytes < room ? row_bytes : room / 16 * 16;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  // Without this the driver may leave room for one block only.
  status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(args.logits.T), kThreads, shared, stream>>>(args,
                                                                             static_cast<int>(shared / 16));
  return cudaGetLastError();
}

template <typename scalar_t, bool kPlain>
cudaError_t dispatch_rows(const CrossEntropyRowsArgs& args,
                          int num_sms,
                          size_t shared_limit,
                          cudaStream_t stream) {
  constexpr int64_t kShortRow = 16 << 10;  // bytes; over in a few loads of 128 threads
  const int64_t row_bytes = args.logits.V * static_cast<int64_t>(sizeof(scalar_t));
  if (row_bytes <= kShortRow) return launch_rows<scalar_t, 128, kPlain>(args, shared_limit, stream);
  // 1 KB of every block is the system's; the statically allocated scratch is within the second.
  const bool two_fit = row_bytes <= static_cast<int64_t>(shared_limit / 2) - 2048;
  if (two_fit && args.logits.T > num_sms) {
    return launch_rows<scalar_t, 512, kPlain>(args, shared_limit, stream);
  }
  return launch_rows<scalar_t, 1024, kPlain>(args, shared_limit, stream);
}

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
  __shared__ double scratch[kBlockThreads / 32];
  double kept = 0.0, cross_entropy = 0.0, entropy = 0.0, square = 0.0, smoothing = 0.0;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < args.T; i += kBlockThreads) {
    if (args.target[i] < 0) continue;  // also keeps a NaN of an ignored row out
    const double lse = static_cast<double>(args.lse[i]);
    kept += 1.0;
    cross_entropy += static_cast<double>(args.cross_entropy[i]);
    entropy += static_cast<double>(args.entropy[i]);
    smoothing += static_cast<double>(args.smoothing[i]);
    square += lse * lse;
  }
  kept = block_sum<kBlockThreads>(kept, scratch);
  cross_entropy = block_sum<kBlockThreads>(cross_entropy, scratch) / kept;  // NaN without a target
  entropy = block_sum<kBlockThreads>(entropy, scratch) / kept;
  smoothing = block_sum<kBlockThreads>(smoothing, scratch) / kept;
  square = block_sum<kBlockThreads>(square, scratch) / kept;
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
    unpack(*reinterpret_cast<const uint4*>(z + i * logits.stride),
           values);  // the padding is there to be read
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (softcap != 0.0f) values[e] = Math::capped(values[e], softcap);
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

cudaError_t launch_cross_entropy_rows(const CrossEntropyRowsArgs& args,
                                      int num_sms,
                                      size_t shared_limit,
                                      cudaStream_t stream) {
  if (args.logits.T == 0) return cudaSuccess;
  if (args.logits.T > INT32_MAX || args.logits.V > INT32_MAX - 16) return cudaErrorInvalidConfiguration;
  const Objective& o = args.objective;
  const bool plain = o.entropy_weight == 0.0f && o.softcap == 0.0f && args.log_marginal == nullptr;
  if (args.logits.dtype == DType::kBFloat16) {
    return plain ? dispatch_rows<__nv_bfloat16, true>(args, num_sms, shared_limit, stream)
                 : dispatch_rows<__nv_bfloat16, false>(args, num_sms, shared_limit, stream);
  }
  return plain ? dispatch_rows<float, true>(args, num_sms, shared_limit, stream)
               : dispatch_rows<float, false>(args, num_sms, shared_limit, stream);
}

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
