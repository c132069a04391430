// Operators of the fused loss: rows of logits, the mean over tokens, and the scale of the gradients.
#include "cuda/cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {
namespace {

LogitRows check_logits(const LaunchContext& context, const Tensor& logits, int64_t V, const Tensor& target) {
  const char* op = context.op();
  context.check_input("logits", logits);
  check_dim(op, "logits", logits, 2);
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) {
    fail(op, "logits must be float32 or bfloat16; got ", dtype_name(dtype));
  }
  const LogitRows rows = {logits.mutable_data_ptr(), dtype_of(dtype), logits.size(0), V, logits.size(1)};
  if (V < 1 || V > rows.stride) fail(op, "V must be between 1 and ", rows.stride, "; got ", V);
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(logits.element_size());
  if (row_bytes % 16 != 0 || reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) {
    fail(op, "logits must have rows that start at multiples of 16 bytes; got rows of ", row_bytes, " bytes");
  }
  context.check_input("target", target, ScalarType::Long);
  check_vector(op, "target", target, rows.T);
  return rows;
}

// The data of an optional scalar, or null.
template <typename T>
const T* optional_scalar(const LaunchContext& context,
                         const char* arg,
                         const std::optional<Tensor>& t,
                         ScalarType dtype) {
  if (!t.has_value()) return nullptr;
  context.check_input(arg, *t, dtype);
  check_numel(context.op(), arg, *t, 1);
  return const_data<T>(*t);
}

Objective objective_of(
    double label_smoothing, double z_loss, double entropy_weight, double diversity_weight, double softcap) {
  return {static_cast<float>(label_smoothing),
          static_cast<float>(z_loss),
          static_cast<float>(entropy_weight),
          static_cast<float>(diversity_weight),
          static_cast<float>(softcap)};
}

Tensor count_targets(const Tensor& target) {
  const LaunchContext context("count_targets", target);
  context.check_input("target", target, ScalarType::Long);
  Tensor count = context.new_tensor({}, ScalarType::Float);
  context.check(launch_count_targets(
      const_data<int64_t>(target), target.numel(), data<float>(count), context.stream()));
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_rows_(
    const Tensor& logits,
    int64_t V,
    const Tensor& target,
    const std::optional<Tensor>& count,
    const std::optional<Tensor>& log_marginal,
    double label_smoothing,
    double z_loss,
    double entropy_weight,
    double diversity_weight,
    double softcap) {
  const LaunchContext context("cross_entropy_rows_", logits);
  CrossEntropyRowsArgs args = {};
  args.logits = check_logits(context, logits, V, target);
  args.target = const_data<int64_t>(target);
  args.count = optional_scalar<float>(context, "count", count, ScalarType::Float);
  args.log_marginal = context.optional_vector("log_marginal", log_marginal, V);
  args.objective = objective_of(label_smoothing, z_loss, entropy_weight, diversity_weight, softcap);
  const int64_t T = args.logits.T;
  Tensor lse = context.new_tensor({T}, ScalarType::Float);
  Tensor cross_entropy = context.new_tensor({T}, ScalarType::Float);
  Tensor entropy = context.new_tensor({T}, ScalarType::Float);
  Tensor smoothing = context.new_tensor({T}, ScalarType::Float);
  Tensor argmax = context.new_tensor({T}, ScalarType::Long);
  args.lse = data<float>(lse);
  args.cross_entropy = data<float>(cross_entropy);
  args.entropy = data<float>(entropy);
  args.smoothing = data<float>(smoothing);
  args.argmax = data<int64_t>(argmax);
  context.check(launch_cross_entropy_rows(
      args, context.num_sms(), shared_memory_limit(context.op(), context.device()), context.stream()));
  return {lse, cross_entropy, entropy, smoothing, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_mean(const Tensor& lse,
                                                              const Tensor& cross_entropy,
                                                              const Tensor& entropy,
                                                              const Tensor& smoothing,
                                                              const Tensor& target,
                                                              const std::optional<Tensor>& marginal_entropy,
                                                              const std::optional<Tensor>& square_sum,
                                                              double label_smoothing,
                                                              double z_loss,
                                                              double entropy_weight,
                                                              double diversity_weight,
                                                              double output_l2) {
  const LaunchContext context("cross_entropy_mean", lse);
  CrossEntropyMeanArgs args = {};
  args.T = target.numel();
  context.check_input("target", target, ScalarType::Long);
  args.target = const_data<int64_t>(target);
  args.lse = context.optional_vector("lse", lse, args.T);
  args.cross_entropy = context.optional_vector("cross_entropy", cross_entropy, args.T);
  args.entropy = context.optional_vector("entropy", entropy, args.T);
  args.smoothing = context.optional_vector("smoothing", smoothing, args.T);
  args.marginal_entropy =
      optional_scalar<float>(context, "marginal_entropy", marginal_entropy, ScalarType::Float);
  args.square_sum = optional_scalar<double>(context, "square_sum", square_sum, ScalarType::Double);
  args.objective = objective_of(label_smoothing, z_loss, entropy_weight, diversity_weight, 0.0);
  args.output_l2 = static_cast<float>(output_l2);
  Tensor loss = context.new_tensor({}, ScalarType::Float);
  Tensor mean_cross_entropy = context.new_tensor({}, ScalarType::Float);
  Tensor mean_entropy = context.new_tensor({}, ScalarType::Float);
  Tensor mean_square = context.new_tensor({}, ScalarType::Float);
  args.loss = data<float>(loss);
  args.mean_cross_entropy = data<float>(mean_cross_entropy);
  args.mean_entropy = data<float>(mean_entropy);
  args.mean_square = data<float>(mean_square);
  context.check(launch_cross_entropy_mean(args, context.stream()));
  return {loss, mean_cross_entropy, mean_entropy, mean_square};
}

Tensor probability_sums(
    const Tensor& logits, int64_t V, const Tensor& target, const Tensor& lse, double softcap) {
  const LaunchContext context("probability_sums", logits);
  const LogitRows rows = check_logits(context, logits, V, target);
  const float* row_lse = context.optional_vector("lse", lse, rows.T);
  Tensor sums =
      context.new_tensor({(rows.T + kProbabilityRows - 1) / kProbabilityRows, V}, ScalarType::Float);
  context.check(launch_probability_sums(rows,
                                        const_data<int64_t>(target),
                                        row_lse,
                                        static_cast<float>(softcap),
                                        data<float>(sums),
                                        context.stream()));
  return sums;
}

void scale_(const std::vector<Tensor>& tensors, const Tensor& scale) {
  const LaunchContext context("scale_", scale);
  const char* op = context.op();
  context.check_input("scale", scale, ScalarType::Float);
  check_numel(op, "scale", scale, 1);
  if (tensors.size() > 2) fail(op, "tensors must be at most 2; got ", tensors.size());
  ScaleArgs args = {};
  args.scale = const_data<float>(scale);
  for (size_t t = 0; t < tensors.size(); ++t) {
    context.check_float_input("tensors", tensors[t]);
    args.data[t] = tensors[t].mutable_data_ptr();
    args.dtype[t] = dtype_of(tensors[t].scalar_type());
    args.numel[t] = tensors[t].numel();
    if (reinterpret_cast<uintptr_t>(args.data[t]) % 16 != 0) {
      fail(op, "tensors must start at multiples of 16 bytes; tensor ", t, " does not");
    }
  }
  context.check(launch_scale(args, context.num_sms(), context.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("count_targets", TORCH_BOX(&count_targets));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_));
  m.impl("cross_entropy_mean", TORCH_BOX(&cross_entropy_mean));
  m.impl("probability_sums", TORCH_BOX(&probability_sums));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace bitnet_ext::cuda
