// Gradients of a gated product behind which an RMS norm stands or not, from the gradient of what was
// quantised.
//
//   h = act(gate) * up,   y = (h * rstd) * gain  or  h                    [M, K]
//   grad_h    = rstd * (g - hhat * mean_k(g * hhat)),  g = grad_y * gain,  hhat = h * rstd
//   grad_up   = grad_h * act(gate),   grad_gate = grad_h * up * act'(gate)
//   grad_gain = sum over rows of grad_y * hhat                            [K]
//
// h is computed again from gate and up, with the roundings of glu_quantize.cu, so nothing but rstd is kept of
// the forward; the results go to the halves of one [M, 2K]. Separate operators would move some 20 values an
// element, this one moves 5: bound by memory, for few rows by latency. The skeleton is in
// common/norm_backward.cuh.
#include <type_traits>

#include "cuda/common/activation.cuh"
#include "cuda/common/norm_backward.cuh"
#include "cuda/glu_backward.h"

namespace bitnet_ext::cuda {
namespace {

template <typename Activation>
struct GluPolicy {
  using Args = GluBackwardArgs;
  static constexpr bool kDivides = std::is_same_v<Activation, Silu>;

  template <typename Shape>
  struct Raw {
    Chunk<Shape::kWhole, Shape::kWords> gate, up;

    __device__ __forceinline__ void load(const Args& args, int64_t row, int64_t k) {
      gate.load(args.gate, row, k, args.norm.K);
      up.load(args.up, row, k, args.norm.K);
    }
    __device__ __forceinline__ void load_value(const Args& args, int64_t row, int64_t k) {
      load(args, row, k);
    }
    __device__ __forceinline__ void forget_unpacked() {
      gate.forget_unpacked();
      up.forget_unpacked();
    }
  };

  // act(gate), rounded as the forward rounds it, and up.
  template <typename Shape>
  static __device__ __forceinline__ void factors(const Args& args,
                                                 const Raw<Shape>& raw,
                                                 float (&activated)[kChunk],
                                                 float (&up)[kChunk]) {
    raw.gate.unpack(args.gate.dtype, activated);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) activated[i] = Activation::apply(activated[i]);
    round_to(args.gate.dtype, activated);
    raw.up.unpack(args.up.dtype, up);
  }

  template <typename Shape>
  static __device__ __forceinline__ void value(const Args& args, const Raw<Shape>& raw, float (&h)[kChunk]) {
    float up[kChunk];
    factors(args, raw, h, up);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h[i] = __fmul_rn(h[i], up[i]);
    round_to(args.gate.dtype, h);
  }

  template <typename Shape>
  static __device__ __forceinline__ void finish(
      const Args& args, const Raw<Shape>& raw, int64_t row, int64_t k, float (&grad)[kChunk]) {
    const int64_t K = args.norm.K;
    float out[kChunk], up[kChunk];
    factors(args, raw, out, up);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] *= grad[i];
    store_chunk<Shape::kWhole>(args.grad_up, row, k, K, out);
    raw.gate.unpack(args.gate.dtype, out);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = grad[i] * up[i] * Activation::derivative(out[i]);
    store_chunk<Shape::kWhole>(args.grad_gate, row, k, K, out);
  }
};

}  // namespace

cudaError_t launch_glu_backward(const GluBackwardArgs& args, cudaStream_t stream) {
  bool whole = true, narrow = true;
  for (const TypedRows* rows : {&args.gate, &args.up, &args.grad_gate, &args.grad_up}) {
    whole &= chunks_aligned(*rows, args.norm.K);
    narrow &= element_bytes(rows->dtype) == 2;
  }
  return args.activation == GluActivation::kRelu2
             ? launch_norm_backward<GluPolicy<Relu2>>(args, whole, narrow, stream)
             : launch_norm_backward<GluPolicy<Silu>>(args, whole, narrow, stream);
}

}  // namespace bitnet_ext::cuda
