// What the backward kernels of an RMS norm have in common: see common/norm_backward.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/typed_rows.h"

namespace bitnet_ext::cuda {

struct NormBackwardArgs {
  TypedRows grad_y;   // [M, K]
  const float* gain;  // [K] or null
  const float* rstd;  // [M]; not read unless normalize is set
  bool normalize;     // false: grad_h is grad_y, and there is no gain
  int64_t M, K;
  float* partials;   // [gain_row_blocks(M), K], workspace; null when gain_row_blocks(M) is 1
  float* grad_gain;  // [K]; null when it is not wanted
  bool dependent_launch;
};

// Blocks of rows whose parts of grad_gain are added at the end: a function of M only, so that the result does
// not depend on the device. 512 are 4 on each multiprocessor of an H200.
constexpr int64_t gain_row_blocks(int64_t M) {
  constexpr int64_t kFewGainRows = 512, kMinRows = 16, kMaxBlocks = 512;
  return M <= kFewGainRows ? 1 : std::min((M + kMinRows - 1) / kMinRows, kMaxBlocks);
}

}  // namespace bitnet_ext::cuda
