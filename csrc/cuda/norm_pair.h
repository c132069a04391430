// Two RMS norms one behind the other and the int8 quantiser behind them, a row in the registers of a warp.
//
//   s = x,  or  x + delta rounded to x's type
//   y = (s * first_rstd) * first_gain, rounded to x's type;  z = (y * rstd) * gain;  z to int8
//
// Both directions give the bits of rms_norm.h and quantize_act.h in two launches, every sum in their order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/typed_rows.h"

namespace bitnet_ext::cuda {

// The longest row that a warp holds in two chunks of 8 values a lane, and the most rows whose gradients of
// the gains are summed in one launch (gain_row_blocks is 1).
constexpr int64_t kMaxNormPairK = 512, kMaxNormPairM = 512;

struct NormPairArgs {
  TypedRows x;      // [M, K], K a multiple of 8; all rows and gains begin at multiples of 16 bytes
  TypedRows delta;  // [M, K], or absent
  TypedRows sum;    // [M, K] of x's type: s
  const float* first_gain;
  const float* gain;  // [K] both
  double first_eps, eps;
  int64_t M, K;
  float* first_rstd;
  float* rstd;       // [M] both
  int8_t* x_i8;      // [M, K]
  float* act_scale;  // [M]
  bool dependent_launch;
};

cudaError_t launch_norm_pair_quantize(const NormPairArgs& args, cudaStream_t stream);

// Columns of a block that sums up the gains' gradients.
constexpr int64_t kNormPairColumns = 32;
constexpr int64_t norm_pair_column_blocks(int64_t K) {
  return (K + kNormPairColumns - 1) / kNormPairColumns;
}

struct NormPairBackwardArgs {
  TypedRows grad_z;         // [M, K]
  TypedRows x;              // [M, K]: s of the formula
  TypedRows grad_residual;  // [M, K] of x's type, or absent: what reaches s by another way
  TypedRows grad_x;         // [M, K] of x's type
  TypedRows grad_delta;     // [M, K], grad_x in another type, or absent
  const float* first_gain;
  const float* gain;  // [K] both
  const float* first_rstd;
  const float* rstd;  // [M] both
  int64_t M, K;       // M <= kMaxNormPairM
  float* grad_first_gain;
  float* grad_gain;  // [K] both
  uint32_t* flags;   // [norm_pair_column_blocks(K), M], zero before the launch and after it
  bool dependent_launch;
};

cudaError_t launch_norm_pair_backward(const NormPairBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
