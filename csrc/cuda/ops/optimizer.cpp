// Operators of the optimiser: the gradient norm and Adam, all tensors in one call.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda/adam.h"
#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {
namespace {

std::string item(const char* arg, size_t i) {
  return std::string(arg) + "[" + std::to_string(i) + "]";
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) fail("sum_of_squares", "tensors must hold at least one tensor; got an empty list");
  const LaunchContext context("sum_of_squares", tensors[0]);
  int64_t blocks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    context.check_float_input(item("tensors", i).c_str(), tensors[i]);
    blocks += blocks_of(tensors[i].numel());
  }
  Tensor partials = context.new_tensor({blocks}, ScalarType::Double);
  Tensor total = context.new_tensor({}, ScalarType::Double);
  double* next = data<double>(partials);
  SquareSumTable table = {};
  uint32_t end = 0;
  const auto flush = [&] {
    context.check(launch_square_sums(table, next, context.stream()));
    next += end;
    table.count = 0;
    end = 0;
  };
  for (const Tensor& t : tensors) {
    const int64_t added = blocks_of(t.numel());
    if (added == 0) continue;
    if (added > INT32_MAX)
      fail(context.op(), "a tensor of ", t.numel(), " elements is too large for one launch");
    if (table.count == SquareSumTable::kMaxTensors || end + added > INT32_MAX) flush();
    table.data[table.count] = t.const_data_ptr();
    table.numel[table.count] = t.numel();
    table.dtype[table.count] = static_cast<uint8_t>(dtype_of(t.scalar_type()));
    table.block_end[table.count++] = end += static_cast<uint32_t>(added);
  }
  flush();
  context.check(
      launch_add_partials(const_data<double>(partials), blocks, data<double>(total), context.stream()));
  return total;
}

// The pointers of a list that has to match params.
std::vector<float*> matching_data(const LaunchContext& context,
                                  const char* arg,
                                  const std::vector<Tensor>& list,
                                  const std::vector<Tensor>& params) {
  if (list.size() != params.size()) {
    fail(context.op(), arg, " must hold as many tensors as params, ", params.size(), "; got ", list.size());
  }
  std::vector<float*> pointers;
  pointers.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string name = item(arg, i);
    context.check_input(name.c_str(), list[i], ScalarType::Float);
    check_same_shape(context.op(), name.c_str(), list[i], item("params", i).c_str(), params[i]);
    pointers.push_back(data<float>(list[i]));
  }
  return pointers;
}

void adam_step_(const std::vector<Tensor>& params,
                const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avg,
                const std::vector<Tensor>& exp_avg_sq,
                const Tensor& hyper,
                const Tensor& grad_scale,
                double beta1,
                double beta2,
                double eps,
                bool decoupled,
                bool decay) {
  const LaunchContext context("adam_step_", hyper);
  const std::vector<float*> p = matching_data(context, "params", params, params);
  const std::vector<float*> g = matching_data(context, "grads", grads, params);
  const std::vector<float*> m = matching_data(context, "exp_avg", exp_avg, params);
  const std::vector<float*> v = matching_data(context, "exp_avg_sq", exp_avg_sq, params);
  context.check_input("hyper", hyper, ScalarType::Float);
  check_vector(context.op(), "hyper", hyper, 4);
  context.check_input("grad_scale", grad_scale, ScalarType::Float);
  check_numel(context.op(), "grad_scale", grad_scale, 1);

  AdamSettings settings = {};
  settings.hyper = const_data<float>(hyper);
  settings.grad_scale = const_data<float>(grad_scale);
  settings.beta1 = static_cast<float>(beta1);
  settings.beta2 = static_cast<float>(beta2);
  settings.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  settings.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  settings.eps = static_cast<float>(eps);
  settings.decoupled = decoupled;
  settings.decay = decay;
  AdamTable table = {};
  uint32_t end = 0;
  const auto flush = [&] {
    context.check(launch_adam_step(table, settings, context.stream()));
    table.count = 0;
    end = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    const int64_t added = blocks_of(numel);
    if (added == 0) continue;
    if (added > INT32_MAX) fail(context.op(), "a tensor of ", numel, " elements is too large for one launch");
    if (table.count == AdamTable::kMaxTensors || end + added > INT32_MAX) flush();
    const auto bits = reinterpret_cast<uintptr_t>(p[i]) | reinterpret_cast<uintptr_t>(g[i]) |
                      reinterpret_cast<uintptr_t>(m[i]) | reinterpret_cast<uintptr_t>(v[i]);
    table.param[table.count] = p[i];
    table.grad[table.count] = g[i];
    table.exp_avg[table.count] = m[i];
    table.exp_avg_sq[table.count] = v[i];
    table.numel[table.count] = numel;
    table.aligned[table.count] = bits % 16 == 0;
    table.block_end[table.count++] = end += static_cast<uint32_t>(added);
  }
  flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
}

}  // namespace bitnet_ext::cuda
