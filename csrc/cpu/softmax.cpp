// Operators of the loss: row statistics of the logits, and the gradient written over them. The [T, V]
// probabilities never exist in memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

// The data of `target`, every value of which is below V.
const int64_t* check_target(const char* op, const Tensor& target, int64_t T, int64_t V) {
  check_input(op, "target", target, ScalarType::Long);
  check_vector(op, "target", target, T);
  const auto* data = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t t = 0; t < T; ++t) {
    if (data[t] >= V)
      fail(op, "target must be below V = ", V, " (negative: ignored); got ", data[t], " in row ", t);
  }
  return data;
}

const float* check_row_vector(const char* op, const char* arg, const Tensor& t, int64_t T) {
  return optional_vector(op, arg, t, T);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats(const Tensor& logits, const Tensor& target) {
  const char* op = "softmax_stats";
  check_input(op, "logits", logits);
  check_dim(op, "logits", logits, 2);
  const auto [T, V, leading] = check_rows(op, "logits", logits);
  constexpr int64_t kMaxVocabulary = 0x7fffffff - 16;  // kernels keep places in int32
  if (V > kMaxVocabulary) fail(op, "logits must have V <= ", kMaxVocabulary, "; got ", V);
  const int64_t* targets = check_target(op, target, T, V);
  Tensor lse = new_tensor({T}, ScalarType::Double);
  Tensor target_logit = new_tensor({T}, ScalarType::Float);
  Tensor mean_logit = new_tensor({T}, ScalarType::Float);
  Tensor expected_logit = new_tensor({T}, ScalarType::Float);
  Tensor argmax = new_tensor({T}, ScalarType::Long);
  const SoftmaxStats out = {static_cast<double*>(lse.mutable_data_ptr()),
                            static_cast<float*>(target_logit.mutable_data_ptr()),
                            static_cast<float*>(mean_logit.mutable_data_ptr()),
                            static_cast<float*>(expected_logit.mutable_data_ptr()),
                            static_cast<int64_t*>(argmax.mutable_data_ptr())};
  const Kernels& table = kernels();
  const auto* z = static_cast<const char*>(logits.const_data_ptr());
  const int64_t row_bytes = V * static_cast<int64_t>(logits.element_size());
  parallel_for(0, T, grain_for(row_bytes), [&, V = V](int64_t begin, int64_t end) {
    const SoftmaxStats part = {out.lse + begin,
                               out.target_logit + begin,
                               out.mean_logit + begin,
                               out.expected_logit + begin,
                               out.argmax + begin};
    table.softmax_stats(
        z + begin * row_bytes, dtype_of(logits.scalar_type()), targets + begin, end - begin, V, part);
  });
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
  const char* op = "softmax_grad_";
  check_input(op, "logits", logits);
  check_dim(op, "logits", logits, 2);
  const auto [T, V, leading] = check_rows(op, "logits", logits);
  SoftmaxGrad in = {};
  in.target = check_target(op, target, T, V);
  in.lse = check_row_vector(op, "lse", lse, T);
  in.row_scale = check_row_vector(op, "row_scale", row_scale, T);
  in.row_coef = check_row_vector(op, "row_coef", row_coef, T);
  in.log_marginal = optional_vector(op, "log_marginal", log_marginal, V);
  in.entropy_weight = static_cast<float>(entropy_weight);
  in.diversity_weight = static_cast<float>(diversity_weight);
  in.target_weight = static_cast<float>(target_weight);
  in.uniform_weight = static_cast<float>(uniform_weight);
  const Kernels& table = kernels();
  auto* z = static_cast<char*>(logits.mutable_data_ptr());
  const int64_t row_bytes = V * static_cast<int64_t>(logits.element_size());
  parallel_for(0, T, grain_for(row_bytes), [&, V = V](int64_t begin, int64_t end) {
    SoftmaxGrad part = in;
    part.target += begin;
    part.lse += begin;
    part.row_scale += begin;
    part.row_coef += begin;
    table.softmax_grad(z + begin * row_bytes, dtype_of(logits.scalar_type()), end - begin, V, part);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_));
}

}  // namespace bitnet_ext::cpu
