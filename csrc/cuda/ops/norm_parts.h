// What the operators around an RMS norm share: rows of any type, and what every backward of the norm needs.
#pragma once

#include <optional>

#include "cuda/launch_context.h"
#include "cuda/norm_backward.h"

namespace bitnet_ext::cuda {

// A contiguous [.., K] tensor, or columns of it: `width` elements from row to row, from `first` on.
inline TypedRows typed_rows(const Tensor& t, int64_t width, int64_t first = 0) {
  char* base = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {base + first * static_cast<int64_t>(t.element_size()), width, dtype_of(t.scalar_type())};
}

// Fills the common arguments of a norm's backward and keeps the tensors they point to. Without `rstd` there
// is no norm.
struct NormGradient {
  NormGradient(const LaunchContext& context,
               const Tensor& grad_y,
               const std::optional<Tensor>& gain,
               const Tensor* rstd,
               const Rows& rows,
               NormBackwardArgs& args)
      : grad_gain(context.new_tensor({gain.has_value() ? rows.K : 0}, ScalarType::Float)) {
    args.grad_y = typed_rows(grad_y, rows.K);
    args.gain = context.optional_vector("gain", gain, rows.K);
    args.normalize = rstd != nullptr;
    if (rstd != nullptr) {
      context.check_input("rstd", *rstd, ScalarType::Float);
      check_numel(context.op(), "rstd", *rstd, rows.M);
      args.rstd = const_data<float>(*rstd);
    }
    args.M = rows.M;
    args.K = rows.K;
    if (gain.has_value()) {
      args.grad_gain = data<float>(grad_gain);
      const int64_t blocks = gain_row_blocks(rows.M);
      if (blocks > 1) {
        partials = context.new_tensor({blocks, rows.K}, ScalarType::Float);
        args.partials = data<float>(*partials);
      }
    }
    args.dependent_launch = context.dependent_launch();
  }

  Tensor grad_gain;  // [K], empty without a gain
  std::optional<Tensor> partials;
};

}  // namespace bitnet_ext::cuda
