// Operators of the optimiser: the gradient norm, clipping and Adam, all tensors in one call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/adam.h"
#include "cuda/grad_norm.h"
#include "cuda/launch_context.h"
#include "cuda/row_gradient.h"

namespace bitnet_ext::cuda {
namespace {

std::string item(const char* arg, size_t i) {
  return std::string(arg) + "[" + std::to_string(i) + "]";
}

// Partial sums of the squares of tensors, those of each in a row.
struct SquareSums {
  Tensor partials;              // float64
  std::vector<int64_t> counts;  // of each tensor
};

// Of all tensors but number `left_out` (-1: of all).
SquareSums square_sums(const LaunchContext& context,
                       const char* arg,
                       const std::vector<Tensor>& tensors,
                       int64_t left_out = -1) {
  SquareSums sums;
  int64_t blocks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    context.check_float_input(item(arg, i).c_str(), tensors[i]);
    sums.counts.push_back(static_cast<int64_t>(i) == left_out ? 0 : square_partials(tensors[i].numel()));
    blocks += sums.counts.back();
  }
  sums.partials = context.new_tensor({blocks}, ScalarType::Double);
  double* next = data<double>(sums.partials);
  SquareSumTable table = {};
  uint32_t end = 0;
  const auto flush = [&] {
    context.check(launch_square_sums(table, next, context.dependent_launch(), context.stream()));
    next += end;
    table.count = 0;
    end = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (sums.counts[i] == 0) continue;
    if (table.count == SquareSumTable::kMaxTensors) flush();
    table.data[table.count] = tensors[i].const_data_ptr();
    table.numel[table.count] = tensors[i].numel();
    table.dtype[table.count] = static_cast<uint8_t>(dtype_of(tensors[i].scalar_type()));
    table.block_end[table.count++] = end += static_cast<uint32_t>(sums.counts[i]);
  }
  flush();
  return sums;
}

Tensor square_partials_of(const Tensor& tensor) {
  const LaunchContext context("square_partials", tensor);
  return square_sums(context, "tensor", {tensor}).partials;
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) fail("sum_of_squares", "tensors must hold at least one tensor; got an empty list");
  const LaunchContext context("sum_of_squares", tensors[0]);
  const SquareSums sums = square_sums(context, "tensors", tensors);
  Tensor total = context.new_tensor({}, ScalarType::Double);
  context.check(launch_add_partials(
      const_data<double>(sums.partials), sums.partials.numel(), data<double>(total), context.stream()));
  return total;
}

std::tuple<Tensor, Tensor> clip_gradients_(const std::vector<Tensor>& grads,
                                           const Tensor& step,
                                           double max_norm,
                                           const Tensor& latch,
                                           const std::optional<Tensor>& known,
                                           int64_t known_index) {
  const char* op = "clip_gradients_";
  if (grads.empty()) fail(op, "grads must hold at least one tensor; got an empty list");
  const LaunchContext context(op, grads[0]);
  context.check_input("step", step, ScalarType::Long);
  check_numel(op, "step", step, 1);
  context.check_input("latch", latch, ScalarType::Double);
  const int64_t count = static_cast<int64_t>(grads.size());
  check_vector(op, "latch", latch, 2 + count);
  check_known(op, grads, known, known_index);
  const SquareSums sums = square_sums(context, "grads", grads, known_index);
  Tensor of_tensors = context.new_tensor({count}, ScalarType::Double);
  Tensor norm = context.new_tensor({}, ScalarType::Float);
  Tensor grad_scale = context.new_tensor({}, ScalarType::Float);
  ClipArgs args = {};
  args.partials = const_data<double>(sums.partials);
  if (known.has_value()) {
    context.check_input("known", *known, ScalarType::Double);
    args.num_known = square_partials(grads[static_cast<size_t>(known_index)].numel());
    check_vector(op, "known", *known, args.num_known);
    args.known = const_data<double>(*known);
    args.known_tensor = known_index;
  }
  args.square_sums = data<double>(of_tensors);
  args.tensors = count;
  args.step = const_data<int64_t>(step);
  args.max_norm = static_cast<float>(max_norm);
  args.latch = data<double>(latch);
  args.norm = data<float>(norm);
  args.grad_scale = data<float>(grad_scale);
  while (args.first_tensor < count) {
    ClipTable table = {};
    uint32_t end = 0;
    while (table.count < ClipTable::kMaxTensors && args.first_tensor + table.count < count) {
      end += static_cast<uint32_t>(sums.counts[static_cast<size_t>(args.first_tensor + table.count)]);
      table.partials_end[table.count++] = end;
    }
    context.check(launch_clip(table, args, context.dependent_launch(), context.stream()));
    args.first_tensor += table.count;
    args.partials += end;
  }
  return {norm, grad_scale};
}

Tensor row_slots(const Tensor& ids, int64_t V) {
  const LaunchContext context("row_slots", ids);
  context.check_input("ids", ids, ScalarType::Long);
  const RowIds sizes = check_row_ids(context.op(), ids, V);
  if (sizes.S > 65535) fail(context.op(), "ids must have at most 65535 rows; got ", sizes.S);
  Tensor slots = context.new_tensor(sizes.slots_shape, ScalarType::Int);
  context.check(launch_row_slots(
      const_data<int64_t>(ids), sizes.S, sizes.T, V, data<int32_t>(slots), context.stream()));
  return slots;
}

Tensor sum_rows(const Tensor& ids, const Tensor& rows, const Tensor& slots) {
  const LaunchContext context("sum_rows", ids);
  context.check_input("ids", ids, ScalarType::Long);
  context.check_input("rows", rows, ScalarType::Float);
  context.check_input("slots", slots, ScalarType::Int);
  check_rows_of_ids(context.op(), ids, rows, slots);
  RowGradientArgs args = {};
  args.ids = const_data<int64_t>(ids);
  args.rows = const_data<float>(rows);
  args.slots = const_data<int32_t>(slots);
  args.T = rows.size(0);
  args.H = rows.size(1);
  args.V = slots.size(0);
  Tensor sums = context.new_tensor({args.T, args.H}, ScalarType::Float);
  args.sums = data<float>(sums);
  args.aligned = args.H % 4 == 0 && reinterpret_cast<uintptr_t>(args.rows) % 16 == 0;
  context.check(launch_sum_rows(args, context.stream()));
  return sums;
}

// The pointers of a list that has to match params. `row_param`: whose entry may have fewer rows, or -1.
std::vector<float*> matching_data(const LaunchContext& context,
                                  const char* arg,
                                  const std::vector<Tensor>& list,
                                  const std::vector<Tensor>& params,
                                  int64_t row_param = -1) {
  check_length(context.op(), arg, list.size(), params.size());
  std::vector<float*> pointers;
  pointers.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string name = item(arg, i);
    context.check_input(name.c_str(), list[i], ScalarType::Float);
    if (static_cast<int64_t>(i) != row_param)
      check_same_shape(context.op(), name.c_str(), list[i], item("params", i).c_str(), params[i]);
    pointers.push_back(data<float>(list[i]));
  }
  return pointers;
}

// Of a gradient by rows; slots are int32, so more rows than those are as good as that.
uint32_t num_rows_of(const Tensor& grad) {
  return static_cast<uint32_t>(std::min<int64_t>(grad.size(0), int64_t{1} << 31));
}

AdamRule adam_rule(double beta1, double beta2, double eps, bool decoupled) {
  AdamRule rule = {};
  rule.beta1 = static_cast<float>(beta1);
  rule.beta2 = static_cast<float>(beta2);
  rule.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  rule.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  rule.eps = static_cast<float>(eps);
  rule.decoupled = decoupled;
  return rule;
}

void adam_step_(const std::vector<Tensor>& params,
                const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avg,
                const std::vector<Tensor>& exp_avg_sq,
                const Tensor& hyper,
                const Tensor& grad_scale,
                const std::vector<int64_t>& decay,
                const std::vector<int64_t>& ternary,
                const std::optional<Tensor>& abs_sums,
                const std::optional<Tensor>& slots,
                int64_t row_param,
                double beta1,
                double beta2,
                double eps,
                bool decoupled,
                int64_t num_blocks) {
  const LaunchContext context("adam_step_", hyper);
  const std::vector<float*> p = matching_data(context, "params", params, params);
  const std::vector<float*> g = matching_data(context, "grads", grads, params, row_param);
  const std::vector<float*> m = matching_data(context, "exp_avg", exp_avg, params);
  const std::vector<float*> v = matching_data(context, "exp_avg_sq", exp_avg_sq, params);
  context.check_input("hyper", hyper, ScalarType::Float);
  check_vector(context.op(), "hyper", hyper, 4);
  context.check_input("grad_scale", grad_scale, ScalarType::Float);
  check_numel(context.op(), "grad_scale", grad_scale, 1);
  AdamSettings settings = {};
  settings.rule = adam_rule(beta1, beta2, eps, decoupled);
  settings.hyper = const_data<float>(hyper);
  settings.grad_scale = const_data<float>(grad_scale);
  check_length(context.op(), "decay", decay.size(), params.size());
  check_length(context.op(), "ternary", ternary.size(), params.size());
  int64_t num_sums = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    if (ternary[i]) num_sums += absmean_partials(params[i].numel());
  }

  if (abs_sums.has_value()) {
    context.check_input("abs_sums", *abs_sums, ScalarType::Double);
    settings.abs_sums = data<double>(*abs_sums);
  }
  check_abs_sums(context.op(), abs_sums, num_sums);
  check_row_param(context.op(), params, grads, slots, row_param);
  check_beside(context.op(), slots, num_blocks, num_sums);
  if (slots.has_value()) {
    context.check_input("slots", *slots, ScalarType::Int);
    settings.slots = const_data<int32_t>(*slots);
    settings.row_width = static_cast<uint32_t>(params[static_cast<size_t>(row_param)].size(1));
    settings.num_rows = num_rows_of(grads[static_cast<size_t>(row_param)]);
  }
  AdamTable table = {};
  uint32_t end = 0, sums = 0;
  const auto flush = [&] {
    const bool dependent = context.dependent_launch();
    context.check(
        num_blocks > 0
            ? launch_adam_beside(table, settings, static_cast<int>(num_blocks), dependent, context.stream())
            : launch_adam_step(table, settings, dependent, context.stream()));
    table.count = 0;
    end = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    const bool wants_sums = ternary[i] != 0;
    const int64_t added = adam_blocks(numel, wants_sums);
    if (added == 0) continue;
    if (added > INT32_MAX || adam_run(numel, wants_sums) > UINT32_MAX) {
      fail(context.op(), "a tensor of ", numel, " elements is too large for one launch");
    }
    if (table.count == AdamTable::kMaxTensors || end + added > INT32_MAX) flush();
    const bool by_rows = static_cast<int64_t>(i) == row_param;
    if (by_rows && numel > UINT32_MAX) {
      fail(context.op(), "a tensor of ", numel, " elements is too large for a gradient by rows");
    }
    const bool whole_vectors = !by_rows || settings.row_width % 4 == 0;
    const auto bits = reinterpret_cast<uintptr_t>(p[i]) | reinterpret_cast<uintptr_t>(g[i]) |
                      reinterpret_cast<uintptr_t>(m[i]) | reinterpret_cast<uintptr_t>(v[i]);
    table.param[table.count] = p[i];
    table.grad[table.count] = g[i];
    table.exp_avg[table.count] = m[i];
    table.exp_avg_sq[table.count] = v[i];
    table.numel[table.count] = numel;
    table.run[table.count] = static_cast<uint32_t>(adam_run(numel, wants_sums));
    table.first_sum[table.count] = sums;
    table.flags[table.count] = static_cast<uint8_t>(
        (bits % 16 == 0 && whole_vectors ? AdamTable::kAligned : 0) | (decay[i] ? AdamTable::kDecay : 0) |
        (wants_sums ? AdamTable::kTernary : 0) | (by_rows ? AdamTable::kRows : 0));
    table.block_end[table.count++] = end += static_cast<uint32_t>(added);
    if (wants_sums) sums += static_cast<uint32_t>(added);
  }
  flush();
}

void adam_rows_(const Tensor& param,
                const Tensor& exp_avg,
                const Tensor& exp_avg_sq,
                const std::vector<Tensor>& grads,
                const Tensor& slots,
                const Tensor& hyper,
                const std::vector<Tensor>& grad_scales,
                const std::optional<Tensor>& ids,
                bool decay,
                double beta1,
                double beta2,
                double eps,
                bool decoupled,
                int64_t num_blocks) {
  const LaunchContext context("adam_rows_", param);
  const char* op = context.op();
  check_pending_steps(op, param, grads, slots, hyper, grad_scales, ids);
  check_num_blocks(op, num_blocks);
  AdamRowsArgs args = {};
  args.rule = adam_rule(beta1, beta2, eps, decoupled);
  args.param = matching_data(context, "param", {param}, {param})[0];
  args.exp_avg = matching_data(context, "exp_avg", {exp_avg}, {param})[0];
  args.exp_avg_sq = matching_data(context, "exp_avg_sq", {exp_avg_sq}, {param})[0];
  context.check_input("slots", slots, ScalarType::Int);
  context.check_input("hyper", hyper, ScalarType::Float);
  args.slots = const_data<int32_t>(slots);
  args.hyper = const_data<float>(hyper);
  args.hyper_stride = hyper.size(1);
  args.V = param.size(0);
  args.H = param.size(1);
  args.steps = static_cast<int>(grads.size());
  args.decay = decay;
  auto bits = reinterpret_cast<uintptr_t>(args.param) | reinterpret_cast<uintptr_t>(args.exp_avg) |
              reinterpret_cast<uintptr_t>(args.exp_avg_sq);
  for (size_t s = 0; s < grads.size(); ++s) {
    context.check_input(item("grads", s).c_str(), grads[s], ScalarType::Float);
    context.check_input(item("grad_scales", s).c_str(), grad_scales[s], ScalarType::Float);
    args.grad[s] = const_data<float>(grads[s]);
    args.num_rows[s] = num_rows_of(grads[s]);
    args.grad_scale[s] = const_data<float>(grad_scales[s]);
    bits |= reinterpret_cast<uintptr_t>(args.grad[s]);
  }
  args.aligned = args.H % 4 == 0 && bits % 16 == 0;
  if (ids.has_value()) {
    context.check_input("ids", *ids, ScalarType::Long);
    args.ids = const_data<int64_t>(*ids);
    args.T = ids->size(0);
  }
  if (param.numel() == 0) return;
  const bool dependent = context.dependent_launch();
  context.check(ids.has_value()
                    ? launch_adam_rows(args, dependent, context.stream())
                    : launch_adam_all_rows(args, static_cast<int>(num_blocks), dependent, context.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
  m.impl("clip_gradients_", TORCH_BOX(&clip_gradients_));
  m.impl("square_partials", TORCH_BOX(&square_partials_of));
  m.impl("row_slots", TORCH_BOX(&row_slots));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
  m.impl("adam_rows_", TORCH_BOX(&adam_rows_));
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
}

}  // namespace bitnet_ext::cuda
