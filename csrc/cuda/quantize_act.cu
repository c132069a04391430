// Row-wise absmax quantisation of activations to int8, optionally behind an RMS norm, and that behind the sum
// with a residual.
//
//   s = x,  or  x + residual rounded to x's type and written                         [M, K]
//   y = s,  or  rstd = 1 / sqrt(mean(s^2) + eps),  y = (s * rstd) * gain
//   a = max(absmax_k |y|, 1e-5);   x_i8 = clamp(rint(y * (127 / a)), -128, 127);   act_scale = a / 127
//
// A row lives in registers between the passes (up to 64 bytes of it a thread), so it is read from memory
// once: bound by memory, sizeof(x) + 1 bytes an element, three times sizeof(x) + 1 with the residual; for few
// rows by latency. Rows of up to 128 vectors of 16 bytes take a warp and no barrier, longer ones a block.
// Rows of more than 4,096 vectors read what does not fit again.
//
// A row that holds NaN or Inf gets act_scale = NaN, and so every result computed with it is NaN. The
// arithmetic is in common/quantize_row.cuh.
#include <type_traits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/quantize_row.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/quantize_act.h"

namespace bitnet_ext::cuda {
namespace {

template <typename scalar_t, int kVec>
struct PlainRow {
  using Vec = RowVec<scalar_t, kVec>;
  using Raw = Vec;
  static constexpr bool kKeeps = false;

  const scalar_t* x;

  __device__ __forceinline__ PlainRow(const QuantizeActArgs& args, int64_t first)
      : x(static_cast<const scalar_t*>(args.x) + first) {}

  __device__ __forceinline__ Raw load(int offset) const {
    return Vec::load(x + offset);
  }
  __device__ __forceinline__ Vec pack(const Raw& raw) const {
    return raw;
  }
};

// Four neighbours of a 16-bit type: what is added to four of fp32.
template <typename scalar_t>
struct HalfVec {
  uint32_t words[2];

  __device__ __forceinline__ void unpack(float (&out)[4]) const {
    const scalar_t* elements = reinterpret_cast<const scalar_t*>(words);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(elements[i]);
  }
  // As RowVec::load, and for its reasons.
  static __device__ __forceinline__ HalfVec load(const scalar_t* p) {
    HalfVec out;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(out.words[0]), "=r"(out.words[1])
                 : "l"(p)
                 : "memory");
    return out;
  }
};

template <typename residual_t>
struct SumWith {
  template <typename scalar_t, int kVec>
  struct Row {
    static constexpr bool kHalf = kVec > 1 && sizeof(residual_t) < sizeof(scalar_t);
    using Vec = RowVec<scalar_t, kVec>;
    using ResidualVec = std::conditional_t<kHalf, HalfVec<residual_t>, RowVec<residual_t, kVec>>;
    struct Raw {
      Vec x;
      ResidualVec residual;
    };
    static constexpr bool kKeeps = true;

    const scalar_t* x;
    const residual_t* residual;
    scalar_t* sum;

    __device__ __forceinline__ Row(const QuantizeActArgs& args, int64_t first)
        : x(static_cast<const scalar_t*>(args.x) + first),
          residual(static_cast<const residual_t*>(args.residual) + first),
          sum(static_cast<scalar_t*>(args.sum) + first) {}

    __device__ __forceinline__ Raw load(int offset) const {
      return {Vec::load(x + offset), ResidualVec::load(residual + offset)};
    }
    __device__ __forceinline__ Vec pack(const Raw& raw) const {
      float a[kVec], b[kVec];
      raw.x.unpack(a);
      raw.residual.unpack(b);
#pragma unroll
      for (int i = 0; i < kVec; ++i) a[i] = __fadd_rn(a[i], b[i]);
      return Vec::pack(a);
    }
    __device__ __forceinline__ void keep(int offset, const Vec& values) const {
      values.store(sum + offset);
    }
  };
};

template <typename Source, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    quantize_act_kernel(const __grid_constant__ QuantizeActArgs args, double inverse_K) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = threadIdx.x % Shape::kThreadsPerRow;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kRows + threadIdx.x / Shape::kThreadsPerRow;
  // Whole warps leave, and only in the form of a warp a row, which has no barrier.
  if (row >= args.M) return;
  const int k = lane * Shape::kVec;
  quantize_row<Shape>(Source(args, row * args.K + k),
                      RowNorm{args.normalize, args.gain, args.eps, inverse_K},
                      row,
                      args.K,
                      k,
                      RowOutput{args.x_i8, args.act_scale, args.rstd});
}

template <template <typename, int> class Source, typename scalar_t>
cudaError_t launch(const QuantizeActArgs& args, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(scalar_t));
  bool wide = rows_aligned(args.x, args.K, kBytes, 16) && rows_aligned(args.gain, 0, 4, 16) &&
              rows_aligned(args.x_i8, args.K, 1, 16 / kBytes);
  if (args.residual != nullptr) {
    const int residual_bytes = element_bytes(args.residual_dtype);
    wide &= rows_aligned(args.residual, args.K, residual_bytes, 16 / kBytes * residual_bytes) &&
            rows_aligned(args.sum, args.K, kBytes, 16);
  }
  return dispatch_row_shape<scalar_t>(args.M, args.K, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_div(args.M, Shape::kRows);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(quantize_act_kernel<Source<scalar_t, Shape::kVec>, Shape>,
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

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream) {
  if (args.M == 0) return cudaSuccess;
  if (args.K > kMaxRowLength) return cudaErrorInvalidValue;
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (args.residual == nullptr) return launch<PlainRow, scalar_t>(args, stream);
    if (args.residual_dtype == args.dtype) {
      return launch<SumWith<scalar_t>::template Row, scalar_t>(args, stream);
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      return args.residual_dtype == DType::kBFloat16
                 ? launch<SumWith<__nv_bfloat16>::template Row, float>(args, stream)
                 : launch<SumWith<__half>::template Row, float>(args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace bitnet_ext::cuda
