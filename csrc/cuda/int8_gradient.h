// The 8-bit form of an output gradient, shared by the kernel that makes it (quantize_grad.cu) and the product
// that reads it (sm90_int8_gemm.cu). For host and device; no torch.
//
// For the weight gradient the tokens are put in order of falling magnitude and cut into stages of 128. The
// value of token j (of stage s) and column n is stored in units of
//
//     unit(s, n) = min(stage_bound[s], column_max[n]) / 126.999
//
// stage_bound falls from stage to stage by powers of two and bounds every value of its tokens, column_max is
// the largest magnitude of the column, both with the token's activation scale applied. So a few tokens with
// large gradients do not cost the others their precision.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

constexpr int kStageTokens = 128;

// Slightly below 127: what lies below the bound stays below 127 whatever the rounding of the scale, and
// rounding it up or down at random then needs no clamp.
constexpr float kLargestCode = 126.999f;
constexpr float kInverseLargestCode = 1.0f / kLargestCode;

constexpr int64_t padded_tokens(int64_t M) {
  return (M + kStageTokens - 1) / kStageTokens * kStageTokens;
}

#ifdef __CUDACC__
// The bound of a stage's column; NaN when the stage's is, as after a gradient that is not finite.
__device__ __forceinline__ float column_bound(float stage_bound, float column_max) {
  return column_max <= stage_bound ? column_max : stage_bound;
}
#endif

}  // namespace bitnet_ext::cuda
