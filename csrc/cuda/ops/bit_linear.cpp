// The training forward of ternary linear layers that share an input.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch_context.h"
#include "cuda/ops/parts.h"

namespace bitnet_ext::cuda {
namespace {

// (y, x_i8, act_scale, rstd, sum, first_rstd). Without the first norm first_rstd is an empty [0] tensor, and
// without delta too so is sum.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bit_linear(
    const Tensor& x,
    const std::optional<Tensor>& delta,
    const std::vector<Tensor>& weights,
    const Tensor& packed,
    const Tensor& weight_scale,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight,
    double norm_eps,
    bool normalize,
    const std::optional<Tensor>& first_norm_weight,
    double first_norm_eps,
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
  check_first_norm(context.op(), first_norm_weight, norm_weight);
  context.optional_vector("bias", bias, N);
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  check_backward(context.op(), backward);
  check_delta(context.op(), x, delta, normalize);
  if (delta.has_value()) context.check_float_input("delta", *delta);
  const bool has_sum = delta.has_value() || first_norm_weight.has_value();
  Tensor sum = context.new_tensor(has_sum ? shape_of(x) : std::vector<int64_t>{0}, x.scalar_type());
  Tensor x_i8, act_scale, rstd, first_rstd;
  if (first_norm_weight.has_value()) {
    std::tie(x_i8, act_scale, rstd, first_rstd) =
        quantize_norm_pair(context, x, *first_norm_weight, first_norm_eps, norm_weight, norm_eps, delta, sum);
  } else {
    std::tie(x_i8, act_scale, rstd) = quantize_rows(context,
                                                    x,
                                                    normalize,
                                                    "norm_weight",
                                                    norm_weight,
                                                    norm_eps,
                                                    delta.has_value() ? &*delta : nullptr,
                                                    &sum);
    first_rstd = context.new_tensor({0}, ScalarType::Float);
  }
  // The kernel in front of the product is the quantiser of x, which does not write the weights.
  Tensor y =
      scaled_product(context, x_i8, act_scale, packed, N, weight_scale, bias, segments, out_dtype, true);
  return {y, x_i8, act_scale, rstd, sum, first_rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
}

}  // namespace bitnet_ext::cuda
