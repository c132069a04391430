// Operators of the loss: statistics and gradient of [T, V] logits.
#include "cuda/softmax.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {
namespace {

Rows check_logits(const LaunchContext& context, const Tensor& logits, const Tensor& target) {
  context.check_float_input("logits", logits);
  check_dim(context.op(), "logits", logits, 2);
  const Rows rows = check_rows(context.op(), "logits", logits);
  context.check_input("target", target, ScalarType::Long);
  check_vector(context.op(), "target", target, rows.M);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats(const Tensor& logits, const Tensor& target) {
  const LaunchContext context("softmax_stats", logits);
  const Rows rows = check_logits(context, logits, target);
  Tensor lse = context.new_tensor({rows.M}, ScalarType::Double);
  Tensor target_logit = context.new_tensor({rows.M}, ScalarType::Float);
  Tensor mean_logit = context.new_tensor({rows.M}, ScalarType::Float);
  Tensor expected_logit = context.new_tensor({rows.M}, ScalarType::Float);
  Tensor argmax = context.new_tensor({rows.M}, ScalarType::Long);
  SoftmaxStatsArgs args = {};
  args.logits = logits.const_data_ptr();
  args.dtype = dtype_of(logits.scalar_type());
  args.target = const_data<int64_t>(target);
  args.T = rows.M;
  args.V = rows.K;
  args.lse = data<double>(lse);
  args.target_logit = data<float>(target_logit);
  args.mean_logit = data<float>(mean_logit);
  args.expected_logit = data<float>(expected_logit);
  args.argmax = data<int64_t>(argmax);
  context.check(launch_softmax_stats(args, context.stream()));
  return {lse, target_logit, mean_logit, expected_logit, argmax};
}

void softmax_grad_(const Tensor& logits,
                   const Tensor& target,
                   const Tensor& lse,
                   const Tensor& row_scale,
                   const Tensor& row_coef,
                   const std::optional<Tensor>& log_marginal,
                   double entropy_weight,
                   double diversity_weight,
                   double target_weight,
                   double uniform_weight) {
  const LaunchContext context("softmax_grad_", logits);
  const Rows rows = check_logits(context, logits, target);
  SoftmaxGradArgs args = {};
  args.logits = logits.mutable_data_ptr();
  args.dtype = dtype_of(logits.scalar_type());
  args.target = const_data<int64_t>(target);
  args.lse = context.optional_vector("lse", lse, rows.M);
  args.row_scale = context.optional_vector("row_scale", row_scale, rows.M);
  args.row_coef = context.optional_vector("row_coef", row_coef, rows.M);
  args.log_marginal = context.optional_vector("log_marginal", log_marginal, rows.K);
  args.T = rows.M;
  args.V = rows.K;
  args.entropy_weight = static_cast<float>(entropy_weight);
  args.diversity_weight = static_cast<float>(diversity_weight);
  args.target_weight = static_cast<float>(target_weight);
  args.uniform_weight = static_cast<float>(uniform_weight);
  context.check(launch_softmax_grad(args, context.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_));
}

}  // namespace bitnet_ext::cuda
