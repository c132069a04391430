// The training product and the backward of its norm.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch_context.h"
#include "cuda/ops/parts.h"
#include "cuda/rms_norm.h"

namespace bitnet_ext::cuda {
namespace {

// (y, x_i8, act_scale, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> bit_linear(const Tensor& x,
                                                      const std::vector<Tensor>& weights,
                                                      const Tensor& packed,
                                                      const Tensor& weight_scale,
                                                      const std::optional<Tensor>& bias,
                                                      const std::optional<Tensor>& norm_weight,
                                                      double norm_eps,
                                                      bool normalize,
                                                      ScalarType out_dtype,
                                                      std::string backward) {
  const LaunchContext context("bit_linear", x);
  // What the parts would report about their own inputs is checked here in terms of this operator's.
  const Rows rows = check_rows(context.op(), "x", x);
  const std::vector<int64_t> segments = check_stack(context.op(), weights, rows.K);
  const int64_t N = std::accumulate(segments.begin(), segments.end(), int64_t{0});
  if (norm_weight.has_value() && !normalize) {
    fail(context.op(), "norm_weight must be absent when normalize is false; got a tensor");
  }
  context.optional_vector("bias", bias, N);
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  check_backward(context.op(), backward);
  auto [x_i8, act_scale, rstd] = quantize_rows(context, x, normalize, "norm_weight", norm_weight, norm_eps);
  // The kernel in front of the product is the quantiser of x, which does not write the weights.
  Tensor y =
      scaled_product(context, x_i8, act_scale, packed, N, weight_scale, bias, segments, out_dtype, true);
  return {y, x_i8, act_scale, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                             const Tensor& x,
                                             const std::optional<Tensor>& gain,
                                             const Tensor& rstd) {
  const LaunchContext context("rms_norm_backward", grad_y);
  context.check_float_input("grad_y", grad_y);
  context.check_float_input("x", x);
  check_same_shape(context.op(), "grad_y", grad_y, "x", x);
  context.check_input("rstd", rstd, ScalarType::Float);
  const Rows rows = check_rows(context.op(), "x", x);
  check_numel(context.op(), "rstd", rstd, rows.M);
  RmsNormBackwardArgs args = {};
  args.gain = context.optional_vector("gain", gain, rows.K);
  const bool has_gain = args.gain != nullptr;
  const int64_t row_blocks = gain_row_blocks(rows.M);
  Tensor grad_x = context.new_tensor(with_last(rows.leading, rows.K), x.scalar_type());
  Tensor grad_gain = context.new_tensor({has_gain ? rows.K : 0}, ScalarType::Float);
  std::optional<Tensor> partials;
  if (has_gain && row_blocks > 1) partials = context.new_tensor({row_blocks, rows.K}, ScalarType::Float);
  args.grad_y = grad_y.const_data_ptr();
  args.grad_dtype = dtype_of(grad_y.scalar_type());
  args.x = x.const_data_ptr();
  args.x_dtype = dtype_of(x.scalar_type());
  args.rstd = const_data<float>(rstd);
  args.M = rows.M;
  args.K = rows.K;
  args.grad_x = grad_x.mutable_data_ptr();
  args.partials = partials.has_value() ? data<float>(*partials) : nullptr;
  args.grad_gain = has_gain ? data<float>(grad_gain) : nullptr;
  context.check(launch_rms_norm_backward(args, context.stream()));
  return {grad_x, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace bitnet_ext::cuda
