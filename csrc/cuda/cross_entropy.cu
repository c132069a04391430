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
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax_math.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/cross_entropy.h"

namespace bitnet_ext::cuda {
namespace {

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

// 16 bytes to shared memory, there after wait_for_copies.
__device__ __forceinline__ void copy_16(uint4* shared, const uint4* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

// Sums of one thread, one warp or the row, of e_j = exp(z_j - max).
template <typename real_t>
struct RowSums {
  real_t e, shifted, total, marginal;  // sum of e_j, e_j shift_j, z_j, e_j l_j
  int argmax;
};

// Which terms a kernel is compiled for. Plain: cross-entropy, smoothing and z-loss, whose gradient is one
// multiplication and addition an element. Any: soft-cap and log_marginal asked for at run time.
enum Terms { kPlain, kEntropy, kAny };

// What the gradient of a row needs, made by one thread for all.
struct RowCoefficients {
  float e_scale;  // of e_j, kPlain
  float p_scale, log_sum, coef;
  float scale, uniform, on_target;
};

template <typename scalar_t, Terms kTerms>
struct RowPass {
  using Math = RowMath<scalar_t>;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  const CrossEntropyRowsArgs& args;
  float base, inverse_cap;

  __device__ __forceinline__ float logit(float raw) const {
    if (kTerms != kAny || args.objective.softcap == 0.0f) return raw;
    return Math::capped(raw, args.objective.softcap, inverse_cap);
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
      if (kTerms == kAny && l != nullptr) sums.marginal = fmaf(e, l[i], sums.marginal);
    }
  }

  // The gradient but for what the target adds; l as in add.
  template <int kCount>
  __device__ __forceinline__ void gradient(const RowCoefficients& row,
                                           const float* l,
                                           float (&values)[kCount]) const {
    const Objective& o = args.objective;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float z = logit(values[i]);
      const float s = kTerms == kPlain ? Math::shift(z, base) : shift(z);
      const float e = Math::exponential(s);
      float grad;
      if constexpr (kTerms == kPlain) {
        grad = fmaf(e, row.e_scale, -row.uniform);
      } else {
        float coef = fmaf(o.entropy_weight, s * Math::kUnit - row.log_sum, row.coef);
        if (kTerms == kAny && l != nullptr) coef = fmaf(o.diversity_weight, l[i], coef);
        grad = fmaf(e * row.p_scale, coef, -row.uniform);
      }
      values[i] = grad * slope(z);
    }
  }
  // Of the capped logit.
  __device__ __forceinline__ float slope(float z) const {
    if (kTerms != kAny || args.objective.softcap == 0.0f) return 1.0f;
    const float share = z * inverse_cap;
    return fmaf(-share, share, 1.0f);
  }
  // The whole gradient at the target.
  __device__ __forceinline__ float target_gradient(const RowCoefficients& row,
                                                   const float* l,
                                                   float raw) const {
    float value[1] = {raw};
    gradient(row, l, value);
    return value[0] - row.on_target * slope(logit(raw));
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
  row.p_scale = static_cast<float>(static_cast<double>(row.scale) / sums.e);
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

template <typename scalar_t, int kThreads, Terms kTerms>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    rows_kernel(const __grid_constant__ CrossEntropyRowsArgs args, int kept) {
  using Pass = RowPass<scalar_t, kTerms>;
  using Math = typename Pass::Math;
  constexpr int kVec = Pass::kVec;
  extern __shared__ uint4 kept_row[];
  __shared__ RowScratch<kThreads> scratch;
  const int64_t V = args.logits.V;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int count = static_cast<int>(V / kVec);                      // whole vectors
  const int64_t tail = static_cast<int64_t>(count) * kVec + thread;  // and one element a thread behind them
  const auto row_vectors = [&](int row) {
    return reinterpret_cast<uint4*>(static_cast<scalar_t*>(args.logits.data) +
                                    static_cast<int64_t>(row) * args.logits.stride);
  };
  const auto copy_row = [&](const uint4* from) {
#pragma unroll 4
    for (int v = thread; v < kept; v += kThreads) copy_16(kept_row + v, from + v);
  };
  copy_row(row_vectors(blockIdx.x));

  const int rows = static_cast<int>(args.logits.T), step = static_cast<int>(gridDim.x);
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += step) {
    uint4* vectors = row_vectors(row);
    scalar_t* z = reinterpret_cast<scalar_t*>(vectors);
    const uint4* next = row < rows - step ? row_vectors(row + step) : nullptr;
    const int64_t target = args.target[row];
    // Read before the row is overwritten; NaN beyond the vocabulary.
    const bool ignored = target < 0, has_target = !ignored && target < V;
    const float target_raw = has_target ? to_float(z[target]) : __uint_as_float(0x7fffffffu);
    const float tail_raw[1] = {tail < V ? to_float(z[tail]) : -INFINITY};

    // Pass 1: the largest raw logit.
    typename Math::Max packed_max = Math::no_max();
    for (int v = kept + thread; v < count; v += kThreads) {
      packed_max = Math::larger(packed_max, Math::vector_max(vectors[v]));
    }
    wait_for_copies();
#pragma unroll 4
    for (int v = thread; v < kept; v += kThreads) {
      packed_max = Math::larger(packed_max, Math::vector_max(kept_row[v]));
    }
    float max = warp_max(fmaxf(Math::single(packed_max), tail_raw[0]));
    if (lane == 0) scratch.max[warp] = max;
    __syncthreads();
    max = warp_max(scratch.max[lane % (kThreads / 32)]);

    // Pass 2: the sums, and where the maximum stands.
    Pass pass{args, 0.0f, 1.0f / args.objective.softcap};
    const float top = pass.logit(max);
    pass.base = Math::base(top);
    RowSums<float> sums = {0.0f, 0.0f, 0.0f, 0.0f, INT32_MAX};
    const auto log_marginal = [&](int64_t j) {
      return args.log_marginal == nullptr ? nullptr : args.log_marginal + j;
    };
    const auto accumulate = [&](const uint4& raw, int v) {
      float values[kVec];
      unpack(raw, values);
      pass.add(values, log_marginal(static_cast<int64_t>(v) * kVec), sums);
      if (Math::single(Math::vector_max(raw)) == max && sums.argmax == INT32_MAX) {
#pragma unroll
        for (int i = kVec - 1; i >= 0; --i) {
          if (values[i] == max) sums.argmax = v * kVec + i;
        }
      }
    };
    for (int v = thread; v < kept; v += kThreads) accumulate(kept_row[v], v);
    for (int v = kept + thread; v < count; v += kThreads) accumulate(vectors[v], v);
    if (tail < V) {
      pass.add(tail_raw, log_marginal(tail), sums);
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
    if (args.count == nullptr) {  // statistics only
      if (next != nullptr) copy_row(next);
      continue;
    }
    __syncthreads();

    // Pass 3: the gradient. Each thread brings the next row into the places it has just read.
    const RowCoefficients coefficients = scratch.row;
    const auto differentiate = [&](const uint4& raw, int v) {
      float values[kVec];
      unpack(raw, values);
      pass.gradient(coefficients, log_marginal(static_cast<int64_t>(v) * kVec), values);
      vectors[v] = pack(values);
    };
    if (ignored) {  // zeros, whatever the row holds
#pragma unroll 4
      for (int v = thread; v < count; v += kThreads) vectors[v] = make_uint4(0, 0, 0, 0);
      if (tail < V) z[tail] = from_float<scalar_t>(0.0f);
      if (next != nullptr) copy_row(next);
    } else {
      if (next != nullptr) {
        for (int v = thread; v < kept; v += kThreads) {
          differentiate(kept_row[v], v);
          copy_16(kept_row + v, next + v);
        }
      } else {
        for (int v = thread; v < kept; v += kThreads) differentiate(kept_row[v], v);
      }
      for (int v = kept + thread; v < count; v += kThreads) differentiate(vectors[v], v);
      if (tail < V) {
        float value[1] = {tail_raw[0]};
        pass.gradient(coefficients, log_marginal(tail), value);
        z[tail] = from_float<scalar_t>(value[0]);
      }
      // Over what the thread that has the target's place has just written there.
      const int64_t vector = target / kVec;
      const int owner = static_cast<int>(vector < count ? (vector < kept ? vector : vector - kept) % kThreads
                                                        : target - static_cast<int64_t>(count) * kVec);
      if (has_target && thread == owner) {
        z[target] =
            from_float<scalar_t>(pass.target_gradient(coefficients, log_marginal(target), target_raw));
      }
    }
    for (int64_t j = V + thread; j < args.logits.stride; j += kThreads) z[j] = from_float<scalar_t>(0.0f);
  }
}

// kPerSm: blocks a multiprocessor that share its memory; each walks over its share of the rows.
template <typename scalar_t, int kThreads, int kPerSm, Terms kTerms>
cudaError_t launch_rows(const CrossEntropyRowsArgs& args,
                        int num_sms,
                        size_t shared_limit,
                        cudaStream_t stream) {
  const auto kernel = rows_kernel<scalar_t, kThreads, kTerms>;
  // 1 KB of every block is the system's, and the limit of one block is that of the multiprocessor less 1 KB.
  const size_t room = (shared_limit + 1024) / kPerSm - 1024 - sizeof(RowScratch<kThreads>) - 64;
  const size_t row_bytes = static_cast<size_t>(args.logits.V) * sizeof(scalar_t) / 16 * 16;
  const size_t shared = row_bytes < room ? row_bytes : room / 16 * 16;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  // Without this the driver may leave room for one block only.
  status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  const int64_t most = static_cast<int64_t>(kPerSm) * num_sms;
  const int64_t blocks = args.logits.T < most ? args.logits.T : most;
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(args, static_cast<int>(shared / 16));
  return cudaGetLastError();
}

template <typename scalar_t, Terms kTerms>
cudaError_t dispatch_rows(const CrossEntropyRowsArgs& args,
                          int num_sms,
                          size_t shared_limit,
                          cudaStream_t stream) {
  const size_t row_bytes = static_cast<size_t>(args.logits.V) * sizeof(scalar_t);
  if (row_bytes <= (16 << 10)) {  // over in a few loads of 128 threads
    return launch_rows<scalar_t, 128, 8, kTerms>(args, num_sms, shared_limit, stream);
  }
  if (row_bytes <= shared_limit / 2 - 2048 && args.logits.T > num_sms) {
    return launch_rows<scalar_t, 512, 2, kTerms>(args, num_sms, shared_limit, stream);
  }
  return launch_rows<scalar_t, 1024, 1, kTerms>(args, num_sms, shared_limit, stream);
}

template <typename scalar_t>
cudaError_t dispatch_terms(const CrossEntropyRowsArgs& args,
                           int num_sms,
                           size_t shared_limit,
                           cudaStream_t stream) {
  const Objective& o = args.objective;
  if (o.softcap != 0.0f || args.log_marginal != nullptr) {
    return dispatch_rows<scalar_t, kAny>(args, num_sms, shared_limit, stream);
  }
  return o.entropy_weight != 0.0f ? dispatch_rows<scalar_t, kEntropy>(args, num_sms, shared_limit, stream)
                                  : dispatch_rows<scalar_t, kPlain>(args, num_sms, shared_limit, stream);
}

}  // namespace

cudaError_t launch_cross_entropy_rows(const CrossEntropyRowsArgs& args,
                                      int num_sms,
                                      size_t shared_limit,
                                      cudaStream_t stream) {
  if (args.logits.T == 0) return cudaSuccess;
  if (args.logits.T > INT32_MAX || args.logits.V > INT32_MAX - 16) return cudaErrorInvalidConfiguration;
  return args.logits.dtype == DType::kBFloat16
             ? dispatch_terms<__nv_bfloat16>(args, num_sms, shared_limit, stream)
             : dispatch_terms<float>(args, num_sms, shared_limit, stream);
}

}  // namespace bitnet_ext::cuda
