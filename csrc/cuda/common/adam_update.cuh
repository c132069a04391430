// Adam's arithmetic of one element, the same bits in every kernel that updates parameters: each product and
// sum is rounded as written here, because the compiler's own choice of what to fuse may differ between
// kernels.
#pragma once

#include "cuda/adam.h"
#include "cuda/common/vec.cuh"

namespace bitnet_ext::cuda {

constexpr int kAdamVec = 4;  // elements a thread updates at once, 16 bytes

// What a step says about every element of a tensor.
struct AdamFactors {
  float grad_scale, step_size, sqrt_correction, coupled_decay, keep;
};

// `decay`: weight decay applies to the tensor.
__device__ __forceinline__ AdamFactors adam_factors(const AdamSettings& settings,
                                                    float grad_scale,
                                                    bool decay) {
  const float lr = settings.hyper[0], weight_decay = settings.hyper[1];
  AdamFactors factors;
  factors.grad_scale = grad_scale;
  factors.step_size = lr / settings.hyper[2];
  factors.sqrt_correction = sqrtf(settings.hyper[3]);
  factors.coupled_decay = decay && !settings.decoupled ? weight_decay : 0.0f;
  factors.keep = decay && settings.decoupled ? fmaf(-lr, weight_decay, 1.0f) : 1.0f;
  return factors;
}

__device__ __forceinline__ void adam_update(const AdamSettings& settings,
                                            const AdamFactors& factors,
                                            const float (&g)[kAdamVec],
                                            float (&p)[kAdamVec],
                                            float (&m)[kAdamVec],
                                            float (&v)[kAdamVec]) {
#pragma unroll
  for (int j = 0; j < kAdamVec; ++j) {
    const float grad = __fmaf_rn(g[j], factors.grad_scale, __fmul_rn(factors.coupled_decay, p[j]));
    m[j] = __fmaf_rn(settings.beta1, m[j], __fmul_rn(settings.one_minus_beta1, grad));
    v[j] = __fmaf_rn(settings.beta2, v[j], __fmul_rn(settings.one_minus_beta2, __fmul_rn(grad, grad)));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v[j]), factors.sqrt_correction), settings.eps);
    p[j] = __fmaf_rn(p[j], factors.keep, -__fmul_rn(factors.step_size, __fdiv_rn(m[j], denominator)));
  }
}

}  // namespace bitnet_ext::cuda
