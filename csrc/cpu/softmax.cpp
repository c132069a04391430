// Operators of the loss: row statistics of the logits, and the gradient written over them. The [T, V]
// probabilities never exist in memory.
#if defined(__linux__)
#include <sys/mman.h>
#endif
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

Tensor count_targets(const Tensor& target) {
  check_input("count_targets", "target", target, ScalarType::Long);
  const auto* data = static_cast<const int64_t*>(target.const_data_ptr());
  Tensor count = new_tensor({}, ScalarType::Float);
  *static_cast<float*>(count.mutable_data_ptr()) =
      static_cast<float>(std::count_if(data, data + target.numel(), [](int64_t y) { return y >= 0; }));
  return count;
}

// The vocabulary of rows of logits that may be padded.
void check_logits(const char* op, const Tensor& logits, int64_t V) {
  check_input(op, "logits", logits, ScalarType::Float);
  check_dim(op, "logits", logits, 2);
  if (V < 1 || V > logits.size(1)) fail(op, "V must be between 1 and ", logits.size(1), "; got ", V);
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
  const char* op = "cross_entropy_rows_";
  check_logits(op, logits, V);
  const int64_t T = logits.size(0), stride = logits.size(1);
  CrossEntropyRows in = {};
  in.target = check_target(op, target, T, V);
  in.log_marginal = optional_vector(op, "log_marginal", log_marginal, V);
  in.label_smoothing = static_cast<float>(label_smoothing);
  in.z_loss = static_cast<float>(z_loss);
  in.entropy_weight = static_cast<float>(entropy_weight);
  in.diversity_weight = static_cast<float>(diversity_weight);
  in.softcap = static_cast<float>(softcap);
  in.write_gradient = count.has_value();
  if (count) {
    check_input(op, "count", *count, ScalarType::Float);
    check_numel(op, "count", *count, 1);
    in.scale = 1.0f / *static_cast<const float*>(count->const_data_ptr());
  }
  Tensor lse = new_tensor({T}, ScalarType::Float);
  Tensor cross_entropy = new_tensor({T}, ScalarType::Float);
  Tensor entropy = new_tensor({T}, ScalarType::Float);
  Tensor smoothing = new_tensor({T}, ScalarType::Float);
  Tensor argmax = new_tensor({T}, ScalarType::Long);
  in.lse = static_cast<float*>(lse.mutable_data_ptr());
  in.cross_entropy = static_cast<float*>(cross_entropy.mutable_data_ptr());
  in.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  in.smoothing = static_cast<float*>(smoothing.mutable_data_ptr());
  in.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  const Kernels& table = kernels();
  auto* z = static_cast<float*>(logits.mutable_data_ptr());
  parallel_for(0, T, grain_for(4 * V), [&](int64_t begin, int64_t end) {
    CrossEntropyRows part = in;
    part.target += begin;
    part.lse += begin;
    part.cross_entropy += begin;
    part.entropy += begin;
    part.smoothing += begin;
    part.argmax += begin;
    table.cross_entropy_rows(z + begin * stride, end - begin, V, stride, part);
  });
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
  const char* op = "cross_entropy_mean";
  const int64_t T = target.numel();
  check_input(op, "target", target, ScalarType::Long);
  const auto* y = static_cast<const int64_t*>(target.const_data_ptr());
  const float* parts[4] = {check_row_vector(op, "lse", lse, T),
                           check_row_vector(op, "cross_entropy", cross_entropy, T),
                           check_row_vector(op, "entropy", entropy, T),
                           check_row_vector(op, "smoothing", smoothing, T)};
  double kept = 0.0, square = 0.0, plain = 0.0, entropies = 0.0, smooth = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    if (y[t] < 0) continue;  // also keeps a NaN of an ignored row out
    kept += 1.0;
    square += static_cast<double>(parts[0][t]) * static_cast<double>(parts[0][t]);
    plain += static_cast<double>(parts[1][t]);
    entropies += static_cast<double>(parts[2][t]);
    smooth += static_cast<double>(parts[3][t]);
  }
  const float means[3] = {static_cast<float>(plain / kept),
                          static_cast<float>(entropies / kept),
                          static_cast<float>(square / kept)};
  double loss = (1.0 - label_smoothing) * (plain / kept) + z_loss * (square / kept) -
                entropy_weight * (entropies / kept);
  if (label_smoothing != 0.0) loss += label_smoothing * (smooth / kept);
  if (marginal_entropy) {
    check_input(op, "marginal_entropy", *marginal_entropy, ScalarType::Float);
    check_numel(op, "marginal_entropy", *marginal_entropy, 1);
    loss -= diversity_weight *
            static_cast<double>(*static_cast<const float*>(marginal_entropy->const_data_ptr()));
  }
  if (square_sum) {
    check_cpu(op, "square_sum", *square_sum);
    check_dtype(op, "square_sum", *square_sum, ScalarType::Double);
    check_numel(op, "square_sum", *square_sum, 1);
    loss += output_l2 * *static_cast<const double*>(square_sum->const_data_ptr());
  }
  const auto scalar = [](float value) {
    Tensor t = new_tensor({}, ScalarType::Float);
    *static_cast<float*>(t.mutable_data_ptr()) = value;
    return t;
  };
  return {scalar(static_cast<float>(loss)), scalar(means[0]), scalar(means[1]), scalar(means[2])};
}

Tensor probability_sums(
    const Tensor& logits, int64_t V, const Tensor& target, const Tensor& lse, double softcap) {
  const char* op = "probability_sums";
  constexpr int64_t kSlice = 32;  // rows of one sum, as on CUDA
  check_logits(op, logits, V);
  const int64_t T = logits.size(0), stride = logits.size(1);
  const int64_t* targets = check_target(op, target, T, V);
  const float* row_lse = check_row_vector(op, "lse", lse, T);
  const int64_t slices = (T + kSlice - 1) / kSlice;
  Tensor sums = new_tensor({slices, V}, ScalarType::Float);
  const Kernels& table = kernels();
  const auto* z = static_cast<const float*>(logits.const_data_ptr());
  auto* out = static_cast<float*>(sums.mutable_data_ptr());
  parallel_for(0, slices, grain_for(4 * V * kSlice), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * kSlice, rows = std::min(kSlice, T - first);
      table.probability_sums(z + first * stride,
                             targets + first,
                             row_lse + first,
                             static_cast<float>(softcap),
                             rows,
                             V,
                             stride,
                             out + s * V);
    }
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> predicted_rows_(const Tensor& logits,
                                                                           int64_t V,
                                                                           const Tensor& target) {
  const char* op = "predicted_rows_";
  constexpr int64_t kSlice = 32;  // rows of one fp32 sum
  check_logits(op, logits, V);
  const int64_t T = logits.size(0), stride = logits.size(1);
  const int64_t* targets = check_target(op, target, T, V);
  const int64_t slices = (T + kSlice - 1) / kSlice;
  Tensor cross_entropy = new_tensor({T}, ScalarType::Double);
  Tensor entropy = new_tensor({T}, ScalarType::Double);
  Tensor top_log_probability = new_tensor({T}, ScalarType::Double);
  Tensor logit_std = new_tensor({T}, ScalarType::Float);
  Tensor argmax = new_tensor({T}, ScalarType::Long);
  Tensor mass = new_tensor({V}, ScalarType::Double);
  Tensor parts = new_tensor({slices, V}, ScalarType::Float);
  const PredictedRows out = {static_cast<double*>(cross_entropy.mutable_data_ptr()),
                             static_cast<double*>(entropy.mutable_data_ptr()),
                             static_cast<double*>(top_log_probability.mutable_data_ptr()),
                             static_cast<float*>(logit_std.mutable_data_ptr()),
                             static_cast<int64_t*>(argmax.mutable_data_ptr()),
                             static_cast<float*>(parts.mutable_data_ptr())};
  const Kernels& table = kernels();
  auto* z = static_cast<float*>(logits.mutable_data_ptr());
  parallel_for(0, slices, grain_for(4 * V * kSlice), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * kSlice, rows = std::min(kSlice, T - first);
      const PredictedRows part = {out.cross_entropy + first,
                                  out.entropy + first,
                                  out.top_log_probability + first,
                                  out.logit_std + first,
                                  out.argmax + first,
                                  out.mass + s * V};
      table.predicted_rows(z + first * stride, targets + first, rows, V, stride, part);
    }
  });
  auto* sums = static_cast<double*>(mass.mutable_data_ptr());
  parallel_for(0, V, grain_for(4 * slices), [&](int64_t begin, int64_t end) {
    std::fill(sums + begin, sums + end, 0.0);
    for (int64_t s = 0; s < slices; ++s) {
      const float* part = out.mass + s * V;
      for (int64_t j = begin; j < end; ++j) sums[j] += static_cast<double>(part[j]);
    }
  });
  return {cross_entropy, entropy, top_log_probability, logit_std, argmax, mass};
}

void prefer_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  // Inwards to whole pages of 4 kB, which every system accepts; the kernel itself finds the large ones
  // inside.
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  // A refusal (no such pages, or larger small ones) costs nothing but the time it was to save.
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
  m.impl("count_targets", TORCH_BOX(&count_targets));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_));
  m.impl("cross_entropy_mean", TORCH_BOX(&cross_entropy_mean));
  m.impl("probability_sums", TORCH_BOX(&probability_sums));
  m.impl("predicted_rows_", TORCH_BOX(&predicted_rows_));
  m.impl("_prefer_huge_pages", TORCH_BOX(&prefer_huge_pages));
}

}  // namespace bitnet_ext::cpu
