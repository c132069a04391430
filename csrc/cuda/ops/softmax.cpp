// Statistics of [T, V] logits.
#include "cuda/softmax.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats(const Tensor& logits, const Tensor& target) {
  const LaunchContext context("softmax_stats", logits);
  context.check_float_input("logits", logits);
  check_dim(context.op(), "logits", logits, 2);
  const Rows rows = check_rows(context.op(), "logits", logits);
  context.check_input("target", target, ScalarType::Long);
  check_vector(context.op(), "target", target, rows.M);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
}

}  // namespace bitnet_ext::cuda
