// Operators that quantise activations and weights.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/ops/parts.h"
#include "cuda/quantize_act.h"
#include "cuda/quantize_weight.h"
#include "packing.h"

namespace bitnet_ext::cuda {

// (x_i8, act_scale, rstd); rstd is an empty [0] tensor without the norm.
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const LaunchContext& context,
                                                 const Tensor& x,
                                                 bool normalize,
                                                 const char* gain_arg,
                                                 const std::optional<Tensor>& gain,
                                                 double eps,
                                                 const Tensor* delta,
                                                 const Tensor* sum) {
  context.check_float_input("x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  QuantizeActArgs args = {};
  args.gain = context.optional_vector(gain_arg, gain, rows.K);
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor rstd = context.new_tensor(normalize ? rows.leading : std::vector<int64_t>{0}, ScalarType::Float);
  args.x = x.const_data_ptr();
  args.dtype = dtype_of(x.scalar_type());
  args.eps = eps;
  args.normalize = normalize;
  args.M = rows.M;
  args.K = rows.K;
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.rstd = data<float>(rstd);
  if (delta != nullptr) {
    args.residual = delta->const_data_ptr();
    args.residual_dtype = dtype_of(delta->scalar_type());
    args.sum = sum->mutable_data_ptr();
  }
  args.dependent_launch = context.dependent_launch();
  context.check(launch_quantize_act(args, context.stream()));
  return {x_i8, act_scale, rstd};
}

std::tuple<Tensor, Tensor> quantize_weight(const LaunchContext& context,
                                           const Tensor& weight,
                                           WeightForm form) {
  context.check_float_input("weight", weight);
  check_matrix(context.op(), "weight", weight);
  QuantizeWeightArgs args = {};
  args.weight = weight.const_data_ptr();
  args.dtype = dtype_of(weight.scalar_type());
  args.N = weight.size(0);
  args.K = weight.size(1);
  Tensor out;
  switch (form) {
    case WeightForm::kCodes:
      out = context.new_tensor({args.N, args.K}, ScalarType::Char);
      args.codes = data<int8_t>(out);
      break;
    case WeightForm::kPacked:
      out = context.new_tensor({args.N, packed_bytes(args.K)}, ScalarType::Byte);
      args.packed = data<uint8_t>(out);
      break;
    case WeightForm::kPrepacked:
      out = context.new_tensor({block_rows(args.N), block_cols(args.K), kLanes, kStepsPerBlock},
                               ScalarType::Int);
      args.prepacked = out.mutable_data_ptr();
      break;
  }
  Tensor weight_scale = context.new_tensor({}, ScalarType::Float);
  Tensor partials = context.new_tensor({absmean_partials(args.N * args.K)}, ScalarType::Double);
  args.partials = data<double>(partials);
  args.weight_scale = data<float>(weight_scale);
  context.check(launch_quantize_weight(args, context.stream()));
  return {out, weight_scale};
}

namespace {

std::tuple<Tensor, Tensor> quantize_act_int8(const Tensor& x) {
  const LaunchContext context("quantize_act_int8", x);
  auto [x_i8, act_scale, rstd] = quantize_rows(context, x, false, "gain", std::nullopt, 0.0);
  return {x_i8, act_scale};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x,
                                                     const std::optional<Tensor>& gain,
                                                     double eps) {
  const LaunchContext context("rms_norm_quantize", x);
  return quantize_rows(context, x, true, "gain", gain, eps);
}

std::tuple<Tensor, Tensor> quantize_weight_ternary(const Tensor& weight) {
  return quantize_weight(LaunchContext("quantize_weight_ternary", weight), weight, WeightForm::kCodes);
}

std::tuple<Tensor, Tensor> quantize_pack_weight(const Tensor& weight) {
  return quantize_weight(LaunchContext("quantize_pack_weight", weight), weight, WeightForm::kPacked);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("quantize_act_int8", TORCH_BOX(&quantize_act_int8));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("quantize_weight_ternary", TORCH_BOX(&quantize_weight_ternary));
  m.impl("quantize_pack_weight", TORCH_BOX(&quantize_pack_weight));
}

}  // namespace bitnet_ext::cuda
