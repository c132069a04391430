// Adam over a list of tensors and the sum of squares for gradient clipping. Tensors are cut into fixed
// chunks, and the chunks of all of them are shared out together, so that many small tensors cost no more than
// one large one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunk = 16384;  // elements
static_assert(kChunk % kSumBlock == 0, "the sums of |w| of a chunk are its own");

struct Chunk {
  size_t tensor;
  int64_t start, count;
};

// Of all tensors but number `left_out` (-1: of all).
std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors, int64_t left_out = -1) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (static_cast<int64_t>(i) == left_out) continue;
    const int64_t total = tensors[i].numel();
    for (int64_t start = 0; start < total; start += kChunk)
      chunks.push_back({i, start, std::min(kChunk, total - start)});
  }
  return chunks;
}

std::string item(const char* arg, size_t i) {
  return std::string(arg) + "[" + std::to_string(i) + "]";
}

// The sum of the squares of each tensor, its chunks added in order; 0 for number `left_out`.
std::vector<double> square_sums(const char* op,
                                const char* arg,
                                const std::vector<Tensor>& tensors,
                                int64_t left_out = -1) {
  for (size_t i = 0; i < tensors.size(); ++i) check_input(op, item(arg, i).c_str(), tensors[i]);
  const Kernels& table = kernels();
  const std::vector<Chunk> chunks = chunks_of(tensors, left_out);
  std::vector<double> sums(chunks.size());
  parallel_for(
      0, static_cast<int64_t>(chunks.size()), grain_for(kChunk * 4), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const Chunk& chunk = chunks[static_cast<size_t>(c)];
          const Tensor& t = tensors[chunk.tensor];
          const auto* data = static_cast<const char*>(t.const_data_ptr());
          sums[static_cast<size_t>(c)] =
              table.sum_of_squares(data + chunk.start * static_cast<int64_t>(t.element_size()),
                                   dtype_of(t.scalar_type()),
                                   chunk.count);
        }
      });
  std::vector<double> of_tensors(tensors.size());
  for (size_t c = 0; c < chunks.size(); ++c) of_tensors[chunks[c].tensor] += sums[c];
  return of_tensors;
}

Tensor scalar(ScalarType dtype) {
  return new_tensor({}, dtype);
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  double total = 0.0;
  for (const double sum : square_sums("sum_of_squares", "tensors", tensors)) total += sum;
  Tensor result = scalar(ScalarType::Double);
  *static_cast<double*>(result.mutable_data_ptr()) = total;
  return result;
}

std::tuple<Tensor, Tensor> clip_gradients_(const std::vector<Tensor>& grads,
                                           const Tensor& step,
                                           double max_norm,
                                           const Tensor& latch,
                                           const std::optional<Tensor>& known,
                                           int64_t known_index) {
  const char* op = "clip_gradients_";
  if (grads.empty()) fail(op, "grads must hold at least one tensor; got an empty list");
  check_input(op, "step", step, ScalarType::Long);
  check_numel(op, "step", step, 1);
  check_input(op, "latch", latch, ScalarType::Double);
  check_vector(op, "latch", latch, 2 + static_cast<int64_t>(grads.size()));
  check_known(op, grads, known, known_index);
  if (known.has_value()) {
    check_input(op, "known", *known, ScalarType::Double);
    check_vector(op, "known", *known, 1);
  }
  std::vector<double> sums = square_sums(op, "grads", grads, known_index);
  if (known.has_value()) {
    sums[static_cast<size_t>(known_index)] = *static_cast<const double*>(known->const_data_ptr());
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  const float norm = static_cast<float>(std::sqrt(total));
  auto* latched = static_cast<double*>(latch.mutable_data_ptr());
  if (!std::isfinite(norm) && !(latched[0] >= 0.0)) {
    latched[0] = static_cast<double>(*static_cast<const int64_t*>(step.const_data_ptr()));
    std::copy(sums.begin(), sums.end(), latched + 2);
  }
  // As torch.nn.utils.clip_grad_norm_: the reciprocal is rounded first.
  const float scale = std::min(1.0f / (norm + 1e-6f) * static_cast<float>(max_norm), 1.0f);
  Tensor norm_out = scalar(ScalarType::Float), scale_out = scalar(ScalarType::Float);
  *static_cast<float*>(norm_out.mutable_data_ptr()) = norm;
  *static_cast<float*>(scale_out.mutable_data_ptr()) =
      latched[0] >= 0.0 ? std::numeric_limits<float>::quiet_NaN() : scale;
  return {norm_out, scale_out};
}

Tensor square_partials(const Tensor& tensor) {
  Tensor result = new_tensor({1}, ScalarType::Double);
  *static_cast<double*>(result.mutable_data_ptr()) = square_sums("square_partials", "tensor", {tensor})[0];
  return result;
}

Tensor row_slots(const Tensor& ids, int64_t V) {
  const char* op = "row_slots";
  check_input(op, "ids", ids, ScalarType::Long);
  const RowIds sizes = check_row_ids(op, ids, V);
  Tensor slots = new_tensor(sizes.slots_shape, ScalarType::Int);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  auto* slot = static_cast<int32_t*>(slots.mutable_data_ptr());
  std::fill(slot, slot + sizes.S * V, -1);
  for (int64_t s = 0; s < sizes.S; ++s, id += sizes.T, slot += V) {
    for (int64_t t = 0; t < sizes.T; ++t) {
      if (id[t] < 0 || id[t] >= V) fail(op, "ids must be in 0..", V - 1, "; got ", id[t]);
      if (slot[id[t]] < 0) slot[id[t]] = static_cast<int32_t>(t);
    }
  }
  return slots;
}

// rows[t] added to the first row of the same id; the others become 0. slots as in csrc/ops.cpp.
Tensor sum_rows(const Tensor& ids, const Tensor& rows, const Tensor& slots) {
  const char* op = "sum_rows";
  check_input(op, "ids", ids, ScalarType::Long);
  check_input(op, "rows", rows, ScalarType::Float);
  check_input(op, "slots", slots, ScalarType::Int);
  check_rows_of_ids(op, ids, rows, slots);
  const int64_t T = rows.size(0), H = rows.size(1), V = slots.size(0);
  Tensor sums = new_tensor({T, H}, ScalarType::Float);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const auto* in = static_cast<const float*>(rows.const_data_ptr());
  const auto* slot = static_cast<const int32_t*>(slots.const_data_ptr());
  auto* out = static_cast<float*>(sums.mutable_data_ptr());
  for (int64_t t = 0; t < T; ++t) {
    const int64_t first = id[t] < 0 || id[t] >= V ? -1 : slot[id[t]];
    if (first < 0 || first > t) fail(op, "slots must be those of ids; token ", t, " has no place in them");
    float* own = out + t * H;
    if (first == t) {
      std::copy(in + t * H, in + (t + 1) * H, own);
    } else {
      for (int64_t k = 0; k < H; ++k) out[first * H + k] += in[t * H + k];
      std::fill(own, own + H, 0.0f);
    }
  }
  return sums;
}

// The data pointers of a list that has to match params; but `row_param` may have fewer rows.
std::vector<float*> matching_data(const char* op,
                                  const char* arg,
                                  const std::vector<Tensor>& list,
                                  const std::vector<Tensor>& params,
                                  int64_t row_param = -1) {
  check_length(op, arg, list.size(), params.size());
  std::vector<float*> data;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string name = item(arg, i);
    check_input(op, name.c_str(), list[i], ScalarType::Float);
    if (static_cast<int64_t>(i) != row_param)
      check_same_shape(op, name.c_str(), list[i], item("params", i).c_str(), params[i]);
    data.push_back(static_cast<float*>(list[i].mutable_data_ptr()));
  }
  return data;
}

// A gradient [V, H] of which only some rows are not 0.
struct RowGradient {
  const int32_t* slots = nullptr;  // [V]: the row of `rows`, or -1
  const float* rows = nullptr;     // [T, H]
  int64_t H = 0;
  std::vector<float> zeros;  // [H]

  // Calls f(place, gradient, length) for the pieces of rows that make up [start, start + count).
  template <typename F>
  void each(int64_t start, int64_t count, const F& f) const {
    for (int64_t place = start; place < start + count;) {
      const int64_t row = place / H, column = place % H;
      const int64_t length = std::min(H - column, start + count - place);
      f(place, (slots[row] < 0 ? zeros.data() : rows + slots[row] * H) + column, length);
      place += length;
    }
  }
};

void check_slot(const char* op, int32_t slot, int64_t rows, size_t grad, int64_t row) {
  if (slot >= rows) {
    fail(op, "slots must be below the ", rows, " rows of grads[", grad, "]; got ", slot, " for row ", row);
  }
}

// Without decay; hyper [4].
AdamStep adam_constants(
    const char* op, const float* hyper, float grad_scale, double beta1, double beta2, double eps) {
  const float lr = hyper[0], weight_decay = hyper[1], bias1 = hyper[2], bias2 = hyper[3];
  if (!(bias1 > 0.0f && bias2 > 0.0f)) {
    fail(op,
         "hyper must hold (lr, weight_decay, 1 - beta1^t, 1 - beta2^t) with the last two > 0; got ",
         bias1,
         " and ",
         bias2);
  }

  AdamStep step = {};
  step.beta1 = static_cast<float>(beta1);
  step.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  step.beta2 = static_cast<float>(beta2);
  step.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  step.grad_scale = grad_scale;
  step.l2 = weight_decay;
  step.shrink = static_cast<float>(1.0 - static_cast<double>(lr) * static_cast<double>(weight_decay));
  step.step_size = lr / bias1;
  step.inv_sqrt_bias = static_cast<float>(1.0 / std::sqrt(static_cast<double>(bias2)));
  step.eps = static_cast<float>(eps);
  return step;
}

AdamStep with_decay(AdamStep step, bool decoupled) {
  step.has_l2 = !decoupled;
  step.has_shrink = decoupled;
  return step;
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
  const char* op = "adam_step_";
  const std::vector<float*> p = matching_data(op, "params", params, params);
  const std::vector<float*> g = matching_data(op, "grads", grads, params, row_param);
  const std::vector<float*> m = matching_data(op, "exp_avg", exp_avg, params);
  const std::vector<float*> v = matching_data(op, "exp_avg_sq", exp_avg_sq, params);
  check_length(op, "decay", decay.size(), params.size());
  check_length(op, "ternary", ternary.size(), params.size());
  std::vector<int64_t> first_sum(params.size());
  int64_t num_sums = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    first_sum[i] = num_sums;
    if (ternary[i]) num_sums += abs_sums_of(params[i].numel());
  }
  double* sums = nullptr;
  if (abs_sums.has_value()) {
    check_input(op, "abs_sums", *abs_sums, ScalarType::Double);
    sums = static_cast<double*>(abs_sums->mutable_data_ptr());
  }
  check_abs_sums(op, abs_sums, num_sums);
  check_row_param(op, params, grads, slots, row_param);
  check_beside(op, slots, num_blocks, num_sums);
  RowGradient row_gradient;
  if (slots.has_value()) {
    check_input(op, "slots", *slots, ScalarType::Int);
    const size_t i = static_cast<size_t>(row_param);
    row_gradient = {static_cast<const int32_t*>(slots->const_data_ptr()),
                    g[i],
                    params[i].size(1),
                    std::vector<float>(static_cast<size_t>(params[i].size(1)))};
    for (int64_t row = 0; row < params[i].size(0); ++row) {
      check_slot(op, row_gradient.slots[row], grads[i].size(0), i, row);
    }
  }
  check_input(op, "hyper", hyper, ScalarType::Float);
  check_vector(op, "hyper", hyper, 4);
  check_input(op, "grad_scale", grad_scale, ScalarType::Float);
  check_numel(op, "grad_scale", grad_scale, 1);
  const AdamStep step = adam_constants(op,
                                       static_cast<const float*>(hyper.const_data_ptr()),
                                       *static_cast<const float*>(grad_scale.const_data_ptr()),
                                       beta1,
                                       beta2,
                                       eps);
  const AdamStep decayed = with_decay(step, decoupled);
  const bool skip = std::isnan(step.grad_scale);  // clip_gradients_ says: no step

  const Kernels& table = kernels();
  const std::vector<Chunk> chunks = chunks_of(params);
  parallel_for(
      0, static_cast<int64_t>(chunks.size()), grain_for(kChunk * 28), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const auto [i, start, count] = chunks[static_cast<size_t>(c)];
          const AdamStep& how = decay[i] ? decayed : step;
          if (!skip && static_cast<int64_t>(i) == row_param) {
            row_gradient.each(start, count, [&](int64_t place, const float* grad, int64_t length) {
              table.adam(p[i] + place, grad, m[i] + place, v[i] + place, length, how);
            });
          } else if (!skip) {
            table.adam(p[i] + start, g[i] + start, m[i] + start, v[i] + start, count, how);
          }
          if (ternary[i]) {  // while the chunk is in the cache
            table.abs_sums(p[i] + start, Dtype::kFloat32, count, sums + first_sum[i] + start / kSumBlock);
          }
        }
      });
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
  const char* op = "adam_rows_";
  check_pending_steps(op, param, grads, slots, hyper, grad_scales, ids);
  check_num_blocks(op, num_blocks);
  float* p = matching_data(op, "param", {param}, {param})[0];
  float* m = matching_data(op, "exp_avg", {exp_avg}, {param})[0];
  float* v = matching_data(op, "exp_avg_sq", {exp_avg_sq}, {param})[0];
  check_input(op, "slots", slots, ScalarType::Int);
  check_input(op, "hyper", hyper, ScalarType::Float);
  std::vector<AdamStep> steps;  // those before the first whose grad_scale is NaN
  std::vector<const float*> rows;
  bool stopped = false;
  for (size_t s = 0; s < grads.size(); ++s) {
    check_input(op, item("grads", s).c_str(), grads[s], ScalarType::Float);
    check_input(op, item("grad_scales", s).c_str(), grad_scales[s], ScalarType::Float);
    const float scale = *static_cast<const float*>(grad_scales[s].const_data_ptr());
    const auto* h =
        static_cast<const float*>(hyper.const_data_ptr()) + static_cast<int64_t>(s) * hyper.size(1);
    const AdamStep step = adam_constants(op, h, scale, beta1, beta2, eps);
    stopped |= std::isnan(scale);
    if (!stopped) steps.push_back(decay ? with_decay(step, decoupled) : step);
    rows.push_back(static_cast<const float*>(grads[s].const_data_ptr()));
  }
  const Kernels& table = kernels();
  const int64_t V = param.size(0), H = param.size(1), pending = static_cast<int64_t>(grads.size());
  const std::vector<float> zeros(static_cast<size_t>(H));
  const auto* slot = static_cast<const int32_t*>(slots.const_data_ptr());
  const auto check_row = [&](int64_t row) {
    for (size_t s = 0; s < grads.size(); ++s) {
      check_slot(op, slot[static_cast<int64_t>(s) * V + row], grads[s].size(0), s, row);
    }
  };
  const auto update = [&](int64_t row) {
    int64_t first = pending - 1;
    while (first > 0 && slot[first * V + row] < 0) --first;
    const int64_t from = slot[first * V + row];
    const float* grad = from < 0 ? zeros.data() : rows[static_cast<size_t>(first)] + from * H;
    for (size_t s = static_cast<size_t>(first); s < steps.size(); ++s, grad = zeros.data()) {
      table.adam(p + row * H, grad, m + row * H, v + row * H, H, steps[s]);
    }
  };
  if (!ids.has_value()) {
    for (int64_t row = 0; row < V; ++row) check_row(row);
    parallel_for(0, V, grain_for(H * 24), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) update(row);
    });
    return;
  }
  check_input(op, "ids", *ids, ScalarType::Long);
  const auto* id = static_cast<const int64_t*>(ids->const_data_ptr());
  const auto is_first = [&](int64_t t) { return id[t] >= 0 && id[t] < V && slot[pending * V + id[t]] == t; };
  for (int64_t t = 0; t < ids->numel(); ++t) {
    if (is_first(t)) check_row(id[t]);
  }
  for (int64_t t = 0; t < ids->numel(); ++t) {
    if (is_first(t)) update(id[t]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
  m.impl("clip_gradients_", TORCH_BOX(&clip_gradients_));
  m.impl("square_partials", TORCH_BOX(&square_partials));
  m.impl("row_slots", TORCH_BOX(&row_slots));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
  m.impl("adam_rows_", TORCH_BOX(&adam_rows_));
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
}

}  // namespace bitnet_ext::cpu
