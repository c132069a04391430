// Two RMS norms one behind the other: with the quantiser, for the operators in front of a product, and their
// backward.
#include "cuda/norm_pair.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/ops/flag_slots.h"
#include "cuda/ops/norm_parts.h"
#include "cuda/ops/parts.h"

namespace bitnet_ext::cuda {
namespace {

void check_norm_pair(const char* op, const Rows& rows, int64_t most_rows) {
  if (rows.K > kMaxNormPairK || rows.K % 8 != 0 || rows.M > most_rows) {
    fail(op,
         "x must have at most ",
         most_rows,
         " rows of K <= ",
         kMaxNormPairK,
         ", a multiple of 8, for two norms at once on CUDA; got ",
         rows.M,
         " of K = ",
         rows.K);
  }
}

// `t`, or where it does not begin at a multiple of 16 bytes, as a view may, a copy that does.
Tensor aligned(const LaunchContext& context, const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  Tensor copy = context.new_tensor(shape_of(t), t.scalar_type());
  context.check(cudaMemcpyAsync(copy.mutable_data_ptr(),
                                t.const_data_ptr(),
                                static_cast<size_t>(t.numel()) * t.element_size(),
                                cudaMemcpyDeviceToDevice,
                                context.stream()));
  return copy;
}
std::optional<Tensor> aligned(const LaunchContext& context, const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(aligned(context, *t)) : std::nullopt;
}

const float* gain_of(const LaunchContext& context, const char* arg, const Tensor& gain, int64_t K) {
  context.check_input(arg, gain, ScalarType::Float);
  check_vector(context.op(), arg, gain, K);
  return const_data<float>(gain);
}

const float* rstd_of(const LaunchContext& context, const char* arg, const Tensor& rstd, int64_t M) {
  context.check_input(arg, rstd, ScalarType::Float);
  check_numel(context.op(), arg, rstd, M);
  return const_data<float>(rstd);
}

// (grad_x, grad_delta, grad_first_gain, grad_gain); grad_delta is grad_x in `delta_dtype`, an empty [0]
// tensor where that is x's.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pair_backward(const Tensor& grad_z,
                                                              const Tensor& x,
                                                              const Tensor& first_gain,
                                                              const Tensor& first_rstd,
                                                              const Tensor& gain,
                                                              const Tensor& rstd,
                                                              const std::optional<Tensor>& grad_residual,
                                                              ScalarType delta_dtype) {
  const LaunchContext context("norm_pair_backward", grad_z);
  context.check_float_input("grad_z", grad_z);
  context.check_float_input("x", x);
  check_same_shape(context.op(), "grad_z", grad_z, "x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  check_norm_pair(context.op(), rows, kMaxNormPairM);
  if (grad_residual.has_value()) {
    context.check_input("grad_residual", *grad_residual, x.scalar_type());
    check_same_shape(context.op(), "grad_residual", *grad_residual, "x", x);
  }
  check_out_dtype(context.op(), "delta_dtype", delta_dtype);
  const Tensor grad_in = aligned(context, grad_z), x_in = aligned(context, x);
  const Tensor first_gain_in = aligned(context, first_gain), gain_in = aligned(context, gain);
  const std::optional<Tensor> residual_in = aligned(context, grad_residual);

  const bool wants_delta = delta_dtype != x.scalar_type();
  const std::vector<int64_t> shape = with_last(rows.leading, rows.K);
  Tensor grad_x = context.new_tensor(shape, x.scalar_type());
  Tensor grad_delta = context.new_tensor(wants_delta ? shape : std::vector<int64_t>{0}, delta_dtype);
  Tensor grad_first_gain = context.new_tensor({rows.K}, ScalarType::Float);
  Tensor grad_gain = context.new_tensor({rows.K}, ScalarType::Float);
  NormPairBackwardArgs args = {};
  args.grad_z = typed_rows(grad_in, rows.K);
  args.x = typed_rows(x_in, rows.K);
  if (residual_in.has_value()) args.grad_residual = typed_rows(*residual_in, rows.K);
  args.grad_x = typed_rows(grad_x, rows.K);
  if (wants_delta) args.grad_delta = typed_rows(grad_delta, rows.K);
  args.first_gain = gain_of(context, "first_gain", first_gain_in, rows.K);
  args.gain = gain_of(context, "gain", gain_in, rows.K);
  args.first_rstd = rstd_of(context, "first_rstd", first_rstd, rows.M);
  args.rstd = rstd_of(context, "rstd", rstd, rows.M);
  args.M = rows.M;
  args.K = rows.K;
  args.grad_first_gain = data<float>(grad_first_gain);
  args.grad_gain = data<float>(grad_gain);
  const int64_t flags = norm_pair_column_blocks(rows.K) * std::max<int64_t>(rows.M, 1);
  args.flags = flag_slots().slot(context.op(), context.device(), context.stream(), flags);
  std::optional<Tensor> own_flags;
  if (args.flags == nullptr) {  // no slot is left for this capture: a node that zeroes some is captured too
    own_flags = context.new_tensor({flags}, ScalarType::Int);
    args.flags = data<uint32_t>(*own_flags);
    context.check(
        cudaMemsetAsync(args.flags, 0, static_cast<size_t>(flags) * sizeof(uint32_t), context.stream()));
  }
  args.dependent_launch = context.dependent_launch();
  context.check(launch_norm_pair_backward(args, context.stream()));
  return {grad_x, grad_delta, grad_first_gain, grad_gain};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_norm_pair(const LaunchContext& context,
                                                              const Tensor& x,
                                                              const Tensor& first_gain,
                                                              double first_eps,
                                                              const std::optional<Tensor>& gain,
                                                              double eps,
                                                              const std::optional<Tensor>& delta,
                                                              const Tensor& sum) {
  context.check_float_input("x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  check_norm_pair(context.op(), rows, INT32_MAX);
  const Tensor x_in = aligned(context, x);
  const Tensor first_gain_in = aligned(context, first_gain), gain_in = aligned(context, *gain);
  const std::optional<Tensor> delta_in = aligned(context, delta);
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor rstd = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor first_rstd = context.new_tensor(rows.leading, ScalarType::Float);
  NormPairArgs args = {};
  args.x = typed_rows(x_in, rows.K);
  if (delta_in.has_value()) args.delta = typed_rows(*delta_in, rows.K);
  args.sum = typed_rows(sum, rows.K);
  args.first_gain = gain_of(context, "first_norm_weight", first_gain_in, rows.K);
  args.gain = gain_of(context, "norm_weight", gain_in, rows.K);
  args.first_eps = first_eps;
  args.eps = eps;
  args.M = rows.M;
  args.K = rows.K;
  args.first_rstd = data<float>(first_rstd);
  args.rstd = data<float>(rstd);
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.dependent_launch = context.dependent_launch();
  context.check(launch_norm_pair_quantize(args, context.stream()));
  return {x_i8, act_scale, rstd, first_rstd};
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("norm_pair_backward", TORCH_BOX(&norm_pair_backward));
}

}  // namespace bitnet_ext::cuda
