// Gradients of the RMS norm y = (x * rstd) * gain, and of a sum in front of it.
//
//   grad_x    = rstd * (g - xhat * mean_k(g * xhat)) + grad_residual     [M, K], g = grad_y * gain, xhat = x
//   * rstd grad_delta = grad_x, in another type                                 [M, K], if wanted grad_gain =
//   sum over rows of grad_y * xhat                           [K]
//
// grad_residual is what reaches x by the way around the norm: added here, x + f(norm(x)) costs no pass of its
// own in the backward. Where x was itself the sum of a stream and a branch of another type, the branch's
// gradient is written in that type beside the stream's. Bound by memory, for few rows by latency: the
// skeleton is in common/norm_backward.cuh.
#include "cuda/common/norm_backward.cuh"
#include "cuda/rms_norm.h"

namespace bitnet_ext::cuda {
namespace {

struct RmsNormPolicy {
  using Args = RmsNormBackwardArgs;
  static constexpr bool kDivides = false;

  template <typename Shape>
  struct Raw {
    Chunk<Shape::kWhole, Shape::kWords> x, residual;

    __device__ __forceinline__ void load_value(const Args& args, int64_t row, int64_t k) {
      x.load(args.x, row, k, args.norm.K);
    }
    __device__ __forceinline__ void load(const Args& args, int64_t row, int64_t k) {
      load_value(args, row, k);
      if (args.grad_residual.base != nullptr) residual.load(args.grad_residual, row, k, args.norm.K);
    }
    __device__ __forceinline__ void forget_unpacked() {
      x.forget_unpacked();
    }
  };

  template <typename Shape>
  static __device__ __forceinline__ void value(const Args& args, const Raw<Shape>& raw, float (&h)[kChunk]) {
    raw.x.unpack(args.x.dtype, h);
  }

  template <typename Shape>
  static __device__ __forceinline__ void finish(
      const Args& args, const Raw<Shape>& raw, int64_t row, int64_t k, float (&grad)[kChunk]) {
    const int64_t K = args.norm.K;
    if (args.grad_residual.base != nullptr) {
      float residual[kChunk];
      raw.residual.unpack(args.grad_residual.dtype, residual);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) grad[i] = __fadd_rn(grad[i], residual[i]);
    }
    store_chunk<Shape::kWhole>(args.grad_x, row, k, K, grad);
    if (args.grad_delta.base != nullptr) store_chunk<Shape::kWhole>(args.grad_delta, row, k, K, grad);
  }
};

}  // namespace

cudaError_t launch_rms_norm_backward(const RmsNormBackwardArgs& args, cudaStream_t stream) {
  bool whole = true, narrow = true;
  for (const TypedRows* rows : {&args.x, &args.grad_residual, &args.grad_x, &args.grad_delta}) {
    whole &= chunks_aligned(*rows, args.norm.K);
    narrow &= rows->base == nullptr || element_bytes(rows->dtype) == 2;
  }
  return launch_norm_backward<RmsNormPolicy>(args, whole, narrow, stream);
}

}  // namespace bitnet_ext::cuda
