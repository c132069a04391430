// From int32 sums to outputs, the same in every product kernel. Sums come in already divided by the factor of
// the weights (kShift of common/weight.cuh).
#pragma once

#include "cuda/common/vec.cuh"
#include "cuda/product.h"

namespace bitnet_ext::cuda {

// Scale and bias of output column n.
struct ColumnFactors {
  float scale;
  float bias;
};

__device__ __forceinline__ ColumnFactors column_factors(const ProductArgs& args, int64_t n) {
  ColumnFactors factors{1.0f, 0.0f};
  if (args.raw) return factors;
  int64_t index = n;
  if (!args.scale_per_row) {
    index = 0;
    while (n >= args.segment_end[index]) ++index;
  }
  factors.scale = args.weight_scale[index];
  if (args.bias != nullptr) factors.bias = args.bias[n];
  return factors;
}

// Each operation is rounded by itself: the reference computes it that way, and a fused multiply-add would
// not.
template <bool kBias>
__device__ __forceinline__ float scaled_output(int acc, float act_scale, const ColumnFactors& factors) {
  const float product = __fmul_rn(__fmul_rn(__int2float_rn(acc), act_scale), factors.scale);
  return kBias ? __fadd_rn(product, factors.bias) : product;
}

__device__ __forceinline__ float scaled_output(const ProductArgs& args,
                                               int acc,
                                               float act_scale,
                                               const ColumnFactors& factors) {
  return args.bias != nullptr ? scaled_output<true>(acc, act_scale, factors)
                              : scaled_output<false>(acc, act_scale, factors);
}

// Writes out[m, n].
__device__ __forceinline__ void store_output(
    const ProductArgs& args, int64_t m, int64_t n, int acc, float act_scale, const ColumnFactors& factors) {
  const int64_t offset = m * args.N + n;
  if (args.raw) {
    static_cast<int32_t*>(args.out)[offset] = acc;
    return;
  }
  const float y = scaled_output(args, acc, act_scale, factors);
  if (args.out_dtype == DType::kFloat32) {
    static_cast<float*>(args.out)[offset] = y;
  } else if (args.out_dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(args.out)[offset] = __float2bfloat16_rn(y);
  } else {
    static_cast<__half*>(args.out)[offset] = __float2half_rn(y);
  }
}

}  // namespace bitnet_ext::cuda
