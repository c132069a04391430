// The sum with a residual, its RMS norm and int8 activations in one pass.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/ops/parts.h"
#include "cuda/quantize_act.h"

namespace bitnet_ext::cuda {
namespace {

// (x_i8, act_scale, sum)
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x,
                                                         const Tensor& residual,
                                                         const std::optional<Tensor>& gain,
                                                         double eps) {
  const LaunchContext context("add_rms_norm_quantize", x);
  context.check_float_input("x", x);
  context.check_input("residual", residual, x.scalar_type());
  check_same_shape(context.op(), "residual", residual, "x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  QuantizeActArgs args = {};
  args.gain = context.optional_vector("gain", gain, rows.K);
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor sum = context.new_tensor(with_last(rows.leading, rows.K), x.scalar_type());
  args.x = x.const_data_ptr();
  args.residual = residual.const_data_ptr();
  args.residual_dtype = dtype_of(residual.scalar_type());
  args.sum = sum.mutable_data_ptr();
  args.dtype = dtype_of(x.scalar_type());
  args.eps = eps;
  args.normalize = true;
  args.M = rows.M;
  args.K = rows.K;
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.dependent_launch = context.dependent_launch();
  context.check(launch_quantize_act(args, context.stream()));
  return {x_i8, act_scale, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
}

}  // namespace bitnet_ext::cuda
