// Row-wise absmax quantisation of activations to int8, optionally behind an RMS norm.
//
//   y = x,  or  rstd = 1 / sqrt(mean(x^2) + eps),  y = (x * rstd) * gain           x [M, K]
//   a = max(absmax_k |y|, 1e-5);   x_i8 = clamp(rint(y * (127 / a)), -128, 127);   act_scale = a / 127
//
// A row lives in registers between the passes (up to 32 values a thread), so it is read from memory once:
// bound by memory, sizeof(x) + 1 bytes an element. Longer rows read what does not fit again, from L1 or L2.
// Rows of up to 1,024 values take one warp and no barrier, longer ones a block.
//
// Every operation is one correctly rounded fp32 operation (no contraction): the reference in PyTorch gives
// the same integers. The squares are summed in fp64, where they are exact. The maximum is taken over the bit
// patterns, in which NaN and Inf are larger than every number: such a row gets act_scale = NaN, and so every
// result computed with it is NaN.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/quantize_act.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kCachedValues = 32;  // a thread; 64 lowers the occupancy before it saves a read
constexpr int kWarpRowLimit = 32 * kCachedValues;
constexpr int kBlockRowThreads = 256;
constexpr unsigned kInfinityBits = 0x7f800000u;

template <typename scalar_t, int kThreadsPerRow>
struct QuantizeActTraits {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  static constexpr int kSlots = kCachedValues / kVec;
  static constexpr int kRows = kThreadsPerRow == 32 ? 4 : 1;  // of a block
  static constexpr int kThreads = kThreadsPerRow * kRows;
};

template <typename scalar_t, bool kNormalize, int kThreadsPerRow>
__global__ void __launch_bounds__(QuantizeActTraits<scalar_t, kThreadsPerRow>::kThreads)
    quantize_act_kernel(const scalar_t* __restrict__ x,
                        const float* __restrict__ gain,
                        double eps,
                        int64_t M,
                        int64_t K,
                        int8_t* __restrict__ x_i8,
                        float* __restrict__ act_scale,
                        float* __restrict__ rstd) {
  using Traits = QuantizeActTraits<scalar_t, kThreadsPerRow>;
  constexpr int kVec = Traits::kVec;
  constexpr int kSlots = Traits::kSlots;
  __shared__ double sum_scratch[kThreadsPerRow / 32];
  __shared__ unsigned max_scratch[kThreadsPerRow / 32];

  const int lane = threadIdx.x % kThreadsPerRow;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Traits::kRows + threadIdx.x / kThreadsPerRow;
  // Whole warps leave, and only in the form of a warp a row, which has no barrier.
  if (row >= M) return;

  const scalar_t* x_row = x + row * K;
  const bool x_aligned = is_aligned(x_row, 16);
  const bool gain_aligned = is_aligned(gain, 16);
  const int64_t num_vecs = ceil_div(K, kVec);

  float cached[kSlots][kVec];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t k = static_cast<int64_t>(slot * kThreadsPerRow + lane) * kVec;
    load_floats(x_row + k, K - k, x_aligned, cached[slot]);
  }

  // Normalise
  float row_rstd = 0.0f;
  const auto normalize = [&](int64_t k, float(&values)[kVec]) {
    float gains[kVec];
    if (gain != nullptr) load_floats(gain + k, K - k, gain_aligned, gains);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      values[i] = __fmul_rn(values[i], row_rstd);
      if (gain != nullptr) values[i] = __fmul_rn(values[i], gains[i]);
    }
  };
  const auto load_again = [&](int64_t vec, float(&values)[kVec]) {
    const int64_t k = vec * kVec;
    load_floats(x_row + k, K - k, x_aligned, values);
    if constexpr (kNormalize) normalize(k, values);
  };
  if constexpr (kNormalize) {
    double sum = 0.0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum = fma(static_cast<double>(cached[slot][i]), static_cast<double>(cached[slot][i]), sum);
      }
    }
    for (int64_t vec = kSlots * kThreadsPerRow + lane; vec < num_vecs; vec += kThreadsPerRow) {
      float values[kVec];
      load_floats(x_row + vec * kVec, K - vec * kVec, x_aligned, values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum = fma(static_cast<double>(values[i]), static_cast<double>(values[i]), sum);
      }
    }
    sum = block_sum<kThreadsPerRow>(sum, sum_scratch);
    row_rstd = static_cast<float>(1.0 / sqrt(sum / static_cast<double>(K) + eps));
    if (lane == 0) rstd[row] = row_rstd;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t k = static_cast<int64_t>(slot * kThreadsPerRow + lane) * kVec;
      if (k < K) normalize(k, cached[slot]);
    }
  }

  // Absolute maximum
  unsigned max_bits = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) max_bits = max(max_bits, __float_as_uint(cached[slot][i]) & 0x7fffffffu);
  }
  for (int64_t vec = kSlots * kThreadsPerRow + lane; vec < num_vecs; vec += kThreadsPerRow) {
    float values[kVec];
    load_again(vec, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) max_bits = max(max_bits, __float_as_uint(values[i]) & 0x7fffffffu);
  }
  max_bits = block_max<kThreadsPerRow>(max_bits, max_scratch);

  const float absmax = __uint_as_float(max(max_bits, __float_as_uint(1e-5f)));
  const float inverse = __fdiv_rn(127.0f, absmax);
  if (lane == 0) {
    act_scale[row] = max_bits < kInfinityBits ? __fdiv_rn(absmax, 127.0f) : __uint_as_float(0x7fffffffu);
  }

  // Quantise
  int8_t* out_row = x_i8 + row * K;
  const bool out_aligned = is_aligned(out_row, kVec);
  const auto store = [&](int64_t k, const float(&values)[kVec]) {
    int rounded[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      rounded[i] = min(max(__float2int_rn(__fmul_rn(values[i], inverse)), -128), 127);
    }
    store_int8(out_row + k, K - k, out_aligned, rounded);
  };
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t k = static_cast<int64_t>(slot * kThreadsPerRow + lane) * kVec;
    if (k < K) store(k, cached[slot]);
  }
  for (int64_t vec = kSlots * kThreadsPerRow + lane; vec < num_vecs; vec += kThreadsPerRow) {
    float values[kVec];
    load_again(vec, values);
    store(vec * kVec, values);
  }
}

template <typename scalar_t, bool kNormalize, int kThreadsPerRow>
cudaError_t launch(const QuantizeActArgs& args, cudaStream_t stream) {
  using Traits = QuantizeActTraits<scalar_t, kThreadsPerRow>;
  const int64_t blocks = ceil_div(args.M, Traits::kRows);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  quantize_act_kernel<scalar_t, kNormalize, kThreadsPerRow>
      <<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(static_cast<const scalar_t*>(args.x),
                                                                       args.gain,
                                                                       args.eps,
                                                                       args.M,
                                                                       args.K,
                                                                       args.x_i8,
                                                                       args.act_scale,
                                                                       args.rstd);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool warp_a_row = args.K <= kWarpRowLimit;
    if (args.normalize) {
      return warp_a_row ? launch<scalar_t, true, 32>(args, stream)
                        : launch<scalar_t, true, kBlockRowThreads>(args, stream);
    }
    return warp_a_row ? launch<scalar_t, false, 32>(args, stream)
                      : launch<scalar_t, false, kBlockRowThreads>(args, stream);
  });
}

}  // namespace bitnet_ext::cuda
