// The training forward of ternary linear layers that share an input.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

#include "cpu/fused_rows.h"
#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

// x + delta, rounded to x's type.
Tensor sum_of(const Tensor& x, const Tensor& delta) {
  Tensor sum = new_tensor(shape_of(x), x.scalar_type());
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dispatch_float(delta.scalar_type(), [&](auto delta_zero) {
      using D = decltype(delta_zero);
      const auto* a = static_cast<const T*>(x.const_data_ptr());
      const auto* b = static_cast<const D*>(delta.const_data_ptr());
      auto* out = static_cast<T*>(sum.mutable_data_ptr());
      torch::stable::parallel_for(
          0, x.numel(), grain_for(3 * static_cast<int64_t>(sizeof(T))), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) out[i] = from_float<T>(to_float(a[i]) + to_float(b[i]));
          });
    });
  });
  return sum;
}

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
  const char* op = "bit_linear";
  check_input(op, "x", x);
  const Rows rows = check_rows(op, "x", x);
  const std::vector<int64_t> segments = check_stack(op, weights, rows.K);
  if (norm_weight && !normalize) fail(op, "norm_weight must be absent when normalize is false; got a tensor");
  check_first_norm(op, first_norm_weight, norm_weight);
  check_backward(op, backward);

  check_delta(op, x, delta, normalize);
  if (delta) check_input(op, "delta", *delta);
  Tensor normed, sum, first_rstd;
  if (first_norm_weight) {
    std::tie(normed, sum, first_rstd) =
        normalize_rows(op, x, delta, "first_norm_weight", first_norm_weight, first_norm_eps);
    if (!delta) {
      sum = new_tensor(shape_of(x), x.scalar_type());
      std::memcpy(sum.mutable_data_ptr(),
                  x.const_data_ptr(),
                  static_cast<size_t>(x.numel()) * static_cast<size_t>(x.element_size()));
    }
  } else {
    sum = delta ? sum_of(x, *delta) : new_tensor({0}, x.scalar_type());
    normed = delta ? sum : x;
    first_rstd = new_tensor({0}, ScalarType::Float);
  }
  Tensor x_i8, act_scale, rstd;
  if (normalize) {
    std::tie(x_i8, act_scale, rstd) =
        normalize_and_quantize(op, normed, "norm_weight", norm_weight, norm_eps);
  } else {
    std::tie(x_i8, act_scale) = quantize_act(op, x);
    rstd = new_tensor({0}, ScalarType::Float);
  }
  Tensor y = scaled_product(op, x_i8, act_scale, packed, weight_scale, bias, segments, out_dtype);
  return {y, x_i8, act_scale, rstd, sum, first_rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
}

}  // namespace bitnet_ext::cpu
