// The RMS norm in one pass, optionally behind the sum with the output of a block.
//
//   s = x,  or  x + delta rounded to x's type and written                 [M, K]
//   rstd = 1 / sqrt(mean_k(s^2) + eps),  y = (s * rstd) * gain            [M], [M, K] in x's type
//
// The mean square is computed in fp64 and rounded once, in rstd, as in common/quantize_row.cuh. A row lives
// in registers between the two passes. Bound by memory, 2 values an element (4 with delta); for few rows by
// latency.
#include "cuda/common/launch.cuh"
#include "cuda/common/row_chunk.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/rms_norm.h"

namespace bitnet_ext::cuda {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormArgs args, double inverse_K) {
  constexpr int kSlots = Shape::kSlots, kT = Shape::kThreadsPerRow;
  constexpr bool kWhole = Shape::kWhole;
  using Raw = Chunk<kWhole, Shape::kWords>;
  __shared__ double scratch[2 * (Shape::kThreads / 32)];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t K = args.K, k0 = static_cast<int64_t>(threadIdx.x % kT) * kChunk;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * Shape::kRows + static_cast<int64_t>(threadIdx.x) / kT;
  const bool live = row < args.M;
  const bool has_delta = args.delta.base != nullptr;

  Raw x[kSlots] = {}, delta[kSlots] = {};
  const auto load_slot = [&](int64_t k, Raw& x_chunk, Raw& delta_chunk) {
    x_chunk.load(args.x, row, k, K);
    if (has_delta) delta_chunk.load(args.delta, row, k, K);
  };
  const auto value = [&](const Raw& x_chunk, const Raw& delta_chunk, float(&v)[kChunk]) {
    x_chunk.unpack(args.x.dtype, v);
    if (!has_delta) return;
    float d[kChunk];
    delta_chunk.unpack(args.delta.dtype, d);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = __fadd_rn(v[i], d[i]);
    round_to(args.x.dtype, v);
  };
  // A row of one warp waits for its gains together with its values: few rows are bound by such trips.
  constexpr bool kGainAhead = kT == 32 && kSlots == 1;
  float gains_ahead[kChunk];
  double even = 0.0, odd = 0.0;
  const auto add_slot = [&](int64_t k, const Raw& x_chunk, const Raw& delta_chunk) {
    float v[kChunk];
    value(x_chunk, delta_chunk, v);
    if (has_delta) store_chunk<kWhole>(args.sum, row, k, K, v);
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      even = fma(static_cast<double>(v[i]), static_cast<double>(v[i]), even);
      odd = fma(static_cast<double>(v[i + 1]), static_cast<double>(v[i + 1]), odd);
    }
  };
  if (live) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int64_t k = k0 + s * Shape::kStep;
      if (k < K) load_slot(k, x[s], delta[s]);
    }
    if constexpr (kGainAhead) {
      if (args.gain != nullptr && k0 < K) load_vector<kWhole>(args.gain, k0, K, gains_ahead);
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int64_t k = k0 + s * Shape::kStep;
      if (k < K) add_slot(k, x[s], delta[s]);
      x[s].forget_unpacked();
      delta[s].forget_unpacked();
    }
    if constexpr (Shape::kLoops) {
      for (int64_t k = k0 + kSlots * Shape::kStep; k < K; k += Shape::kStep) {
        Raw x_chunk, delta_chunk;
        load_slot(k, x_chunk, delta_chunk);
        add_slot(k, x_chunk, delta_chunk);
      }
    }
  }
  const double total = chunk_row_sum<Shape>(even + odd, scratch, 0);
  if (!live) return;
  const float rstd = static_cast<float>(rsqrt(fma(total, inverse_K, args.eps)));
  if (k0 == 0) args.rstd[row] = rstd;
  const auto finish_slot = [&](int64_t k, const Raw& x_chunk, const Raw& delta_chunk) {
    float v[kChunk];
    value(x_chunk, delta_chunk, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = __fmul_rn(v[i], rstd);
    if (args.gain != nullptr) {
      float gains[kChunk];
      if constexpr (!kGainAhead) load_vector<kWhole>(args.gain, k, K, gains);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = __fmul_rn(v[i], kGainAhead ? gains_ahead[i] : gains[i]);
    }
    store_chunk<kWhole>(args.y, row, k, K, v);
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = k0 + s * Shape::kStep;
    if (k < K) finish_slot(k, x[s], delta[s]);
  }
  if constexpr (Shape::kLoops) {
    for (int64_t k = k0 + kSlots * Shape::kStep; k < K; k += Shape::kStep) {
      Raw x_chunk, delta_chunk;
      load_slot(k, x_chunk, delta_chunk);
      finish_slot(k, x_chunk, delta_chunk);
    }
  }
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  bool whole = reinterpret_cast<uintptr_t>(args.gain) % 16 == 0;
  for (const TypedRows* rows : {&args.x, &args.delta, &args.sum, &args.y}) {
    whole &= chunks_aligned(*rows, args.K);
  }
  // Rows longer than 8,192 are read again: the shape for longer ones of 16 bits would spill here.
  return dispatch_chunk_shape<false>(args.K, whole, false, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_div(args.M, Shape::kRows);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(rms_norm_kernel<Shape>,
                         dim3(static_cast<unsigned>(blocks)),
                         dim3(Shape::kThreads),
                         0,
                         stream,
                         args.dependent_launch,
                         args,
                         1.0 / static_cast<double>(args.K));
  });
}

}  // namespace bitnet_ext::cuda
