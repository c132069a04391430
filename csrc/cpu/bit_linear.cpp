// The training forward of ternary linear layers that share an input.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
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
  const char* op = "bit_linear";
  check_input(op, "x", x);
  const Rows rows = check_rows(op, "x", x);
  const std::vector<int64_t> segments = check_stack(op, weights, rows.K);
  if (norm_weight && !normalize) fail(op, "norm_weight must be absent when normalize is false; got a tensor");
  check_backward(op, backward);

  Tensor x_i8, act_scale, rstd;
  if (normalize) {
    std::tie(x_i8, act_scale, rstd) = normalize_and_quantize(op, x, "norm_weight", norm_weight, norm_eps);
  } else {
    std::tie(x_i8, act_scale) = quantize_act(op, x);
    rstd = new_tensor({0}, ScalarType::Float);
  }
  Tensor y = scaled_product(op, x_i8, act_scale, packed, weight_scale, bias, segments, out_dtype);
  return {y, x_i8, act_scale, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
}

}  // namespace bitnet_ext::cpu
