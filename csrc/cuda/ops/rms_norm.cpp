// The RMS norm, optionally behind the sum with the output of a block, and its backward.
#include "cuda/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/ops/norm_parts.h"
#include "cuda/ops/parts.h"

namespace bitnet_ext::cuda {
namespace {

// (y, sum, rstd); sum is an empty [0] tensor without delta.
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x,
                                            const std::optional<Tensor>& delta,
                                            const std::optional<Tensor>& gain,
                                            double eps) {
  const LaunchContext context("rms_norm", x);
  context.check_float_input("x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  if (delta.has_value()) {
    context.check_float_input("delta", *delta);
  }
  check_delta(context.op(), x, delta, true);
  RmsNormArgs args = {};
  args.gain = context.optional_vector("gain", gain, rows.K);
  const std::vector<int64_t> shape = with_last(rows.leading, rows.K);
  Tensor y = context.new_tensor(shape, x.scalar_type());
  Tensor sum = context.new_tensor(delta.has_value() ? shape : std::vector<int64_t>{0}, x.scalar_type());
  Tensor rstd = context.new_tensor(rows.leading, ScalarType::Float);
  args.x = typed_rows(x, rows.K);
  if (delta.has_value()) {
    args.delta = typed_rows(*delta, rows.K);
    args.sum = typed_rows(sum, rows.K);
  }
  args.y = typed_rows(y, rows.K);
  args.eps = eps;
  args.M = rows.M;
  args.K = rows.K;
  args.rstd = data<float>(rstd);
  args.dependent_launch = context.dependent_launch();
  context.check(launch_rms_norm(args, context.stream()));
  return {y, sum, rstd};
}

// (grad_x, grad_delta, grad_gain); grad_delta is grad_x in `delta_dtype`, an empty [0] tensor where that is
// x's.
std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                                     const Tensor& x,
                                                     const std::optional<Tensor>& gain,
                                                     const Tensor& rstd,
                                                     const std::optional<Tensor>& grad_residual,
                                                     ScalarType delta_dtype) {
  const LaunchContext context("rms_norm_backward", grad_y);
  context.check_float_input("grad_y", grad_y);
  context.check_float_input("x", x);
  check_same_shape(context.op(), "grad_y", grad_y, "x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  if (grad_residual.has_value()) {
    context.check_input("grad_residual", *grad_residual, x.scalar_type());
    check_same_shape(context.op(), "grad_residual", *grad_residual, "x", x);
  }
  check_out_dtype(context.op(), "delta_dtype", delta_dtype);
  const bool wants_delta = delta_dtype != x.scalar_type();
  const std::vector<int64_t> shape = with_last(rows.leading, rows.K);
  Tensor grad_x = context.new_tensor(shape, x.scalar_type());
  Tensor grad_delta = context.new_tensor(wants_delta ? shape : std::vector<int64_t>{0}, delta_dtype);
  RmsNormBackwardArgs args = {};
  const NormGradient gradient(context, grad_y, gain, &rstd, rows, args.norm);
  args.x = typed_rows(x, rows.K);
  if (grad_residual.has_value()) args.grad_residual = typed_rows(*grad_residual, rows.K);
  args.grad_x = typed_rows(grad_x, rows.K);
  if (wants_delta) args.grad_delta = typed_rows(grad_delta, rows.K);
  context.check(launch_rms_norm_backward(args, context.stream()));
  return {grad_x, grad_delta, gradient.grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace bitnet_ext::cuda
