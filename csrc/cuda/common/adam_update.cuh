// Adam's arithmetic of one element, the same bits in every kernel that updates parameters: each product and
// sum is rounded as written here, because the compiler's own choice of what to fuse may differ between
// kernels.
//
// Root and quotients are the short way through what nvcc makes of __fsqrt_rn and __fdiv_rn: an approximation,
// Newton's step, an exact residual. Without the branches to rare operands, three an element, which would keep
// a thread from computing on several elements at once, an element takes 25 instructions. The results are
// correctly rounded for sqrt(v) with v >= 2^-101 and for quotients with |m| >= 2^-100. A smaller v counts as
// at most v + 2^-126, and so does 0: that is not seen beside an eps of 1e-10 or more. A smaller m moves no
// parameter. v = inf, which takes a gradient of 1e19, gives NaN.
#pragma once

#include "cuda/adam.h"
#include "cuda/common/vec.cuh"

namespace bitnet_ext::cuda {

constexpr int kAdamVec = 4;  // elements a thread updates at once, 16 bytes

// What a step says about every element of a tensor; its alignment lets shared memory give it in two reads.
struct alignas(16) AdamFactors {
  float grad_scale, step_size, coupled_decay, keep;
  float sqrt_correction, inv_sqrt_correction;
};

// `hyper` [4] as in AdamSettings. `decay`: weight decay applies to the tensor.
__device__ __forceinline__ AdamFactors adam_factors(const AdamRule& rule,
                                                    const float* hyper,
                                                    float grad_scale,
                                                    bool decay) {
  const float lr = hyper[0], weight_decay = hyper[1];
  AdamFactors factors;
  factors.grad_scale = grad_scale;
  factors.step_size = lr / hyper[2];
  factors.coupled_decay = decay && !rule.decoupled ? weight_decay : 0.0f;
  factors.keep = decay && rule.decoupled ? fmaf(-lr, weight_decay, 1.0f) : 1.0f;
  factors.sqrt_correction = sqrtf(hyper[3]);
  factors.inv_sqrt_correction = __frcp_rn(factors.sqrt_correction);
  return factors;
}

// sqrt(v) for v >= 0.
__device__ __forceinline__ float adam_sqrt(float v) {
  const float square = __fadd_rn(v, 0x1p-126f);  // v itself from 2^-101 on
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float root = __fmul_rn(square, inverse);
  return __fmaf_rn(__fmaf_rn(-root, root, square), __fmul_rn(inverse, 0.5f), root);
}

// a / b for b's reciprocal.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
  const float first = __fmul_rn(a, inverse);
  return __fmaf_rn(inverse, __fmaf_rn(-b, first, a), first);
}

// a / b for a normal b.
__device__ __forceinline__ float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return quotient(a, b, __fmaf_rn(inverse, __fmaf_rn(-b, inverse, 1.0f), inverse));
}

template <int kVec>
__device__ __forceinline__ void adam_update(const AdamRule& rule,
                                            const AdamFactors& factors,
                                            const float (&g)[kVec],
                                            float (&p)[kVec],
                                            float (&m)[kVec],
                                            float (&v)[kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float grad = __fmaf_rn(g[j], factors.grad_scale, __fmul_rn(factors.coupled_decay, p[j]));
    m[j] = __fmaf_rn(rule.beta1, m[j], __fmul_rn(rule.one_minus_beta1, grad));
    v[j] = __fmaf_rn(rule.beta2, v[j], __fmul_rn(rule.one_minus_beta2, __fmul_rn(grad, grad)));
    const float root = quotient(adam_sqrt(v[j]), factors.sqrt_correction, factors.inv_sqrt_correction);
    const float ratio = quotient(m[j], __fadd_rn(root, rule.eps));
    p[j] = __fmaf_rn(p[j], factors.keep, -__fmul_rn(factors.step_size, ratio));
  }
}

}  // namespace bitnet_ext::cuda
