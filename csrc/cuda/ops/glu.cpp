// The gated product of a feed-forward block: to int8, as the input of a ternary product, and backward.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/glu_backward.h"
#include "cuda/glu_quantize.h"
#include "cuda/ops/norm_parts.h"
#include "cuda/ops/parts.h"
#include "row_stride.h"

namespace bitnet_ext::cuda {
namespace {

GluActivation activation_of(const char* op, const std::string& name) {
  if (name == "relu2") return GluActivation::kRelu2;
  if (name == "silu") return GluActivation::kSilu;
  fail(op, "activation must be relu2 or silu; got '", name, "'");
}

// The rows [M, K] of the halves of gate_up [.., 2 K].
Rows half_rows(const LaunchContext& context, const Tensor& gate_up) {
  context.check_float_input("gate_up", gate_up);
  Rows rows = check_rows(context.op(), "gate_up", gate_up);
  if (rows.K % 2 != 0) {
    fail(context.op(), "gate_up must have an even last dimension; got ", shape_text(gate_up));
  }
  rows.K /= 2;
  return rows;
}

// Launches the quantiser for `rows`; gate, up, their strides and types, activation and norm are in `args`.
// (x_i8, act_scale, rstd); rstd is an empty [0] tensor without the norm.
std::tuple<Tensor, Tensor, Tensor> quantize_glu(const LaunchContext& context,
                                                const Rows& rows,
                                                GluQuantizeArgs& args) {
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor rstd =
      context.new_tensor(args.normalize ? rows.leading : std::vector<int64_t>{0}, ScalarType::Float);
  args.M = rows.M;
  args.K = rows.K;
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.rstd = args.normalize ? data<float>(rstd) : nullptr;
  args.dependent_launch = context.dependent_launch();
  context.check(launch_glu_quantize(args, context.stream()));
  return {x_i8, act_scale, rstd};
}

// (x_i8, act_scale)
std::tuple<Tensor, Tensor> glu_quantize(const Tensor& gate,
                                        const Tensor& up,
                                        std::string activation,
                                        const std::optional<Tensor>& gain,
                                        double eps,
                                        bool normalize) {
  const LaunchContext context("glu_quantize", gate);
  const char* op = context.op();
  check_cuda(op, "gate", gate, context.device());
  check_float(op, "gate", gate);
  check_cuda(op, "up", up, context.device());
  check_dtype(op, "up", up, gate.scalar_type());
  check_same_shape(op, "up", up, "gate", gate);
  const Rows rows = check_rows(op, "gate", gate);
  GluQuantizeArgs args = {};
  args.gate_stride = check_row_stride(op, "gate", gate);
  args.up_stride = check_row_stride(op, "up", up);
  args.activation = activation_of(op, activation);
  args.gain = context.optional_vector("gain", gain, rows.K);
  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  args.dtype = dtype_of(gate.scalar_type());
  args.eps = eps;
  args.normalize = normalize;
  auto [x_i8, act_scale, rstd] = quantize_glu(context, rows, args);
  return {x_i8, act_scale};
}

// (y, x_i8, act_scale, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> glu_bit_linear(const Tensor& gate_up,
                                                          const Tensor& weight,
                                                          const Tensor& packed,
                                                          const Tensor& weight_scale,
                                                          const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& norm_weight,
                                                          double norm_eps,
                                                          bool normalize,
                                                          std::string activation,
                                                          ScalarType out_dtype,
                                                          std::string backward) {
  const LaunchContext context("glu_bit_linear", gate_up);
  const Rows rows = half_rows(context, gate_up);
  const int64_t N = check_stack(context.op(), {weight}, rows.K).front();
  if (norm_weight.has_value() && !normalize) {
    fail(context.op(), "norm_weight must be absent when normalize is false; got a tensor");
  }
  context.optional_vector("bias", bias, N);
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  check_backward(context.op(), backward);
  const TypedRows gate = typed_rows(gate_up, 2 * rows.K), up = typed_rows(gate_up, 2 * rows.K, rows.K);
  GluQuantizeArgs args = {};
  args.gate = gate.base;
  args.up = up.base;
  args.gate_stride = args.up_stride = gate.stride;
  args.dtype = gate.dtype;
  args.activation = activation_of(context.op(), activation);
  args.gain = context.optional_vector("norm_weight", norm_weight, rows.K);
  args.eps = norm_eps;
  args.normalize = normalize;
  auto [x_i8, act_scale, rstd] = quantize_glu(context, rows, args);
  // The kernel in front of the product is the quantiser, which does not write the weights.
  Tensor y = scaled_product(context, x_i8, act_scale, packed, N, weight_scale, bias, {}, out_dtype, true);
  return {y, x_i8, act_scale, rstd};
}

// (grad_gate_up, grad_gain)
std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad_y,
                                        const Tensor& gate_up,
                                        std::string activation,
                                        const std::optional<Tensor>& gain,
                                        const Tensor& rstd,
                                        bool normalize) {
  const LaunchContext context("glu_backward", gate_up);
  const char* op = context.op();
  const Rows rows = half_rows(context, gate_up);
  context.check_float_input("grad_y", grad_y);
  const std::vector<int64_t> shape = with_last(rows.leading, rows.K);
  if (shape_of(grad_y) != shape) {
    fail(op, "grad_y must have shape ", shape_text(shape), "; got ", shape_text(grad_y));
  }
  if (gain.has_value() && !normalize) fail(op, "gain must be absent when normalize is false; got a tensor");
  Tensor grad_gate_up = context.new_tensor(with_last(rows.leading, 2 * rows.K), gate_up.scalar_type());
  GluBackwardArgs args = {};
  const NormGradient gradient(context, grad_y, gain, normalize ? &rstd : nullptr, rows, args.norm);
  args.gate = typed_rows(gate_up, 2 * rows.K);
  args.up = typed_rows(gate_up, 2 * rows.K, rows.K);
  args.grad_gate = typed_rows(grad_gate_up, 2 * rows.K);
  args.grad_up = typed_rows(grad_gate_up, 2 * rows.K, rows.K);
  args.activation = activation_of(op, activation);
  context.check(launch_glu_backward(args, context.stream()));
  return {grad_gate_up, gradient.grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize));
  m.impl("glu_bit_linear", TORCH_BOX(&glu_bit_linear));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace bitnet_ext::cuda
