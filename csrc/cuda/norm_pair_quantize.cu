// The sum with the output of a block, two RMS norms of it and the int8 quantiser: norm_pair.h's formula.
//
// A warp has a row, [M, K] rows of K <= 512 values in chunks of 8. The first norm adds up its squares in the
// order of rms_norm.cu, chunk by chunk, the second in that of quantize_row.cuh, where a lane has other values
// of an fp32 row: the row between them goes through shared memory. Bound by latency: one trip to memory and
// three reductions of a warp.
#include "cuda/common/launch.cuh"
#include "cuda/common/quantize_row.cuh"
#include "cuda/common/row_chunk.cuh"
#include "cuda/norm_pair.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

// The first norm's result as the quantiser's row: kVec values a vector, as many as 16 bytes of x hold.
template <int kVec>
struct NormedRow {
  struct Vec {
    float values[kVec];

    __device__ __forceinline__ void unpack(float (&out)[kVec]) const {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = values[i];
    }
    __device__ __forceinline__ void forget_unpacked() {}
  };
  using Raw = Vec;
  static constexpr bool kKeeps = false;

  const float* y;  // in shared memory

  __device__ __forceinline__ Raw load(int offset) const {
    Vec out;
    load_gains(y + offset, out.values);
    return out;
  }
  __device__ __forceinline__ Vec pack(const Raw& raw) const {
    return raw;
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    norm_pair_quantize_kernel(const __grid_constant__ NormPairArgs args, double inverse_K) {
  constexpr int kRowLength = 32 * Shape::kVec * Shape::kSlots, kSlots = kRowLength / (32 * kChunk);
  __shared__ __align__(16) float normed[Shape::kRows][kRowLength];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kRows + warp;
  if (row >= args.M) return;  // whole warps, and there is no barrier of the block
  const int64_t K = args.K;
  const bool has_delta = args.delta.base != nullptr;

  Chunk<true, 8> x[kSlots] = {}, delta[kSlots] = {};
  float gains[kSlots][kChunk];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = (lane + 32 * s) * kChunk;
    if (k >= K) continue;
    x[s].load(args.x, row, k, K);
    if (has_delta) delta[s].load(args.delta, row, k, K);
    load_vector<true>(args.first_gain, k, K, gains[s]);
  }
  float v[kSlots][kChunk];
  double even = 0.0, odd = 0.0;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = (lane + 32 * s) * kChunk;
    if (k >= K) continue;
    x[s].unpack(args.x.dtype, v[s]);
    if (has_delta) {
      float d[kChunk];
      delta[s].unpack(args.delta.dtype, d);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[s][i] = __fadd_rn(v[s][i], d[i]);
      round_to(args.x.dtype, v[s]);
    }
    store_chunk<true>(args.sum, row, k, K, v[s]);
    add_squares<false>(v[s], even, odd);
  }
  const double total = warp_sum(even + odd);
  const float rstd = static_cast<float>(rsqrt(fma(total, inverse_K, args.first_eps)));
  if (lane == 0) args.first_rstd[row] = rstd;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t k = (lane + 32 * s) * kChunk;
    if (k >= K) continue;
    multiply(v[s], rstd);
    multiply(v[s], gains[s]);
    round_to(args.x.dtype, v[s]);
    store_floats(normed[warp] + k, kChunk, true, v[s]);
  }
  __syncwarp();
  const int first = lane * Shape::kVec;
  quantize_row<Shape>(NormedRow<Shape::kVec>{normed[warp] + first},
                      RowNorm{true, args.gain, args.eps, inverse_K},
                      row,
                      K,
                      first,
                      RowOutput{args.x_i8, args.act_scale, args.rstd});
}

}  // namespace

cudaError_t launch_norm_pair_quantize(const NormPairArgs& args, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (args.K > kMaxNormPairK || args.K % kChunk != 0) return cudaErrorInvalidValue;
  const auto launch = [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_div(args.M, Shape::kRows);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(norm_pair_quantize_kernel<Shape>,
                         dim3(static_cast<unsigned>(blocks)),
                         dim3(Shape::kThreads),
                         0,
                         stream,
                         args.dependent_launch,
                         args,
                         1.0 / static_cast<double>(args.K));
  };
  // A row's vectors decide the order of its sums, and slots beyond its end add zeros.
  const bool is_short = args.K <= 256;
  if (element_bytes(args.x.dtype) == 4) {
    return is_short ? launch(RowShape<4, 32, 2>{}) : launch(RowShape<4, 32, 4>{});
  }
  return is_short ? launch(RowShape<8, 32, 1>{}) : launch(RowShape<8, 32, 2>{});
}

}  // namespace bitnet_ext::cuda
