// Rows that lie apart: the halves of a fused [.., 2F] product are [.., F] views whose rows are 2F apart.
#pragma once

#include <cstdint>

#include "checks.h"

namespace bitnet_ext {

// Elements from one row of a [.., K] tensor to the next. Rows must be contiguous, and the leading dimensions
// evenly spaced as if they were one.
inline int64_t check_row_stride(const char* op, const char* arg, const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const size_t last = sizes.size() - 1;
  bool accepted = sizes[last] <= 1 || strides[last] == 1;
  int64_t row_stride = sizes[last];  // of a single row: any
  int64_t count = 1;                 // rows of the dimensions seen so far
  for (size_t i = last; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (count == 1) {
      row_stride = strides[i];
    } else {
      accepted &= strides[i] == row_stride * count;
    }
    count *= sizes[i];
  }
  if (!accepted && t.numel() > 0) {
    fail(op,
         arg,
         " must have contiguous rows, all one stride apart; got shape ",
         shape_text(t),
         " with strides ",
         shape_text(std::vector<int64_t>(strides.begin(), strides.end())));
  }
  return row_stride;
}

}  // namespace bitnet_ext
