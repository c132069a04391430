// Operators that end in int8 activations and take in what stands before the quantiser in a transformer block.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/glu_quantize.h"
#include "cuda/ops/parts.h"
#include "cuda/quantize_act.h"
#include "row_stride.h"

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

GluActivation activation_of(const char* op, const std::string& name) {
  if (name == "relu2") return GluActivation::kRelu2;
  if (name == "silu") return GluActivation::kSilu;
  fail(op, "activation must be relu2 or silu; got '", name, "'");
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
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  args.dtype = dtype_of(gate.scalar_type());
  args.eps = eps;
  args.normalize = normalize;
  args.M = rows.M;
  args.K = rows.K;
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.dependent_launch = context.dependent_launch();
  context.check(launch_glu_quantize(args, context.stream()));
  return {x_i8, act_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize));
}

}  // namespace bitnet_ext::cuda
