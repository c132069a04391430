// The gated product of a feed-forward block, quantised to int8 by rows, optionally behind an RMS norm.
//
//   h = act(gate) * up          gate, up [M, K], act(g) = relu(g)^2 or silu(g) = g / (1 + exp(-g))
//   y = h,  or  rstd = 1 / sqrt(mean(h^2) + eps),  y = (h * rstd) * gain
//   a = max(absmax_k |y|, 1e-5);   x_i8 = clamp(rint(y * (127 / a)), -128, 127);   act_scale = a / 127
//
// act and the product are rounded to the dtype of gate, as PyTorch's own operators round them when they are
// called one by one: the integers are theirs. h never reaches memory: the bound is 2 sizeof(gate) + 1 bytes
// an element, where separate operators move 8 sizeof(gate) + 1 (relu, square, product, quantiser) or 6
// (silu); for few rows it is latency. Rows of gate and up may be any stride apart, so both may be halves of
// one product.
//
// A row that holds NaN or Inf gets act_scale = NaN, and so every result computed with it is NaN. The
// arithmetic behind h is in common/quantize_row.cuh.
#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/quantize_row.cuh"
#include "cuda/glu_quantize.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

template <typename Activation_, typename scalar_t, int kVec>
struct GluRow {
  using Activation = Activation_;
  using Vec = RowVec<scalar_t, kVec>;
  struct Raw {
    Vec gate, up;
  };
  static constexpr bool kKeeps = false;

  const scalar_t *gate, *up;

  __device__ __forceinline__ GluRow(const GluQuantizeArgs& args, int64_t row, int k)
      : gate(static_cast<const scalar_t*>(args.gate) + row * args.gate_stride + k),
        up(static_cast<const scalar_t*>(args.up) + row * args.up_stride + k) {}

  __device__ __forceinline__ Raw load(int offset) const {
    return {Vec::load(gate + offset), Vec::load(up + offset)};
  }
  __device__ __forceinline__ Vec pack(const Raw& raw) const {
    float h[kVec], u[kVec];
    raw.gate.unpack(h);
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[i] = Activation::apply(h[i]);
    Vec rounded = Vec::pack(h);
    rounded.forget_unpacked();
    rounded.unpack(h);
    raw.up.unpack(u);
    multiply(h, u);
    return Vec::pack(h);
  }
};

template <typename Source, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads,
                                  (Shape::kMinBlocks * Source::Activation::kResidentQuarters + 3) / 4)
    glu_quantize_kernel(const __grid_constant__ GluQuantizeArgs args, double inverse_K) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = threadIdx.x % Shape::kThreadsPerRow;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kRows + threadIdx.x / Shape::kThreadsPerRow;
  // Whole warps leave, and only in the form of a warp a row, which has no barrier.
  if (row >= args.M) return;
  const int k = lane * Shape::kVec;
  quantize_row<Shape>(Source(args, row, k),
                      RowNorm{args.normalize, args.gain, args.eps, inverse_K},
                      row,
                      args.K,
                      k,
                      RowOutput{args.x_i8, args.act_scale, args.rstd});
}

template <typename Activation, typename scalar_t>
cudaError_t launch(const GluQuantizeArgs& args, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(scalar_t));
  constexpr int kWideVec = 16 / kBytes;
  const bool wide = args.K % kWideVec == 0 && rows_aligned(args.gate, args.gate_stride, kBytes, 16) &&
                    rows_aligned(args.up, args.up_stride, kBytes, 16) && rows_aligned(args.gain, 0, 4, 16) &&
                    rows_aligned(args.x_i8, args.K, 1, kWideVec);
  return dispatch_row_shape<scalar_t>(args.M, args.K, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_div(args.M, Shape::kRows);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(glu_quantize_kernel<GluRow<Activation, scalar_t, Shape::kVec>, Shape>,
                         dim3(static_cast<unsigned>(blocks)),
                         dim3(Shape::kThreads),
                         0,
                         stream,
                         args.dependent_launch,
                         args,
                         1.0 / static_cast<double>(args.K));
  });
}

}  // namespace

cudaError_t launch_glu_quantize(const GluQuantizeArgs& args, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (args.K > kMaxRowLength) return cudaErrorInvalidValue;
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    return args.activation == GluActivation::kRelu2 ? launch<Relu2, scalar_t>(args, stream)
                                                    : launch<Silu, scalar_t>(args, stream);
  });
}

}  // namespace bitnet_ext::cuda
