// Operators that quantise and prepack several weights at once: the layers that share an input, or all of a
// model.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch_context.h"
#include "cuda/quantize_weight.h"
#include "cuda/quantize_weight_groups.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

std::string item(const char* arg, size_t i) {
  return std::string(arg) + "[" + std::to_string(i) + "]";
}

// Checks the weights [begin, end), which are stacked along N, and returns the rows of the stack.
int64_t check_group(const LaunchContext& context,
                    const std::vector<Tensor>& weights,
                    size_t begin,
                    size_t end) {
  const char* op = context.op();
  int64_t rows = 0;
  for (size_t i = begin; i < end; ++i) {
    const Tensor& weight = weights[i];
    const std::string name = item("weights", i);
    context.check_float_input(name.c_str(), weight);
    check_dtype(op, name.c_str(), weight, weights[0].scalar_type());
    check_matrix(op, name.c_str(), weight);
    if (weight.size(1) != weights[begin].size(1)) {
      fail(op,
           name,
           " must have K = ",
           weights[begin].size(1),
           " like ",
           item("weights", begin),
           "; got ",
           shape_text(weight));
    }
    if (i + 1 < end && weight.size(0) % kBlockRows != 0) {
      fail(op,
           name,
           " must have N, a multiple of ",
           kBlockRows,
           ", as another weight is stacked below it on CUDA; got ",
           shape_text(weight));
    }
    if (weight.size(0) > INT32_MAX || weight.size(1) > kMaxPrepackedTernaryK ||
        block_rows(weight.size(0)) * block_cols(weight.size(1)) > INT32_MAX) {
      fail(op, name, " of shape ", shape_text(weight), " is too large for one launch");
    }
    rows += weight.size(0);
  }
  return rows;
}

int64_t partials_of(const std::vector<Tensor>& weights) {
  int64_t count = 0;
  for (const Tensor& weight : weights) count += absmean_partials(weight.numel());
  return count;
}

// Where the codes of one weight and its scale go.
struct Target {
  char* prepacked;
  float* weight_scale;
};

// In as many launches as tables are needed: two a table, or one when the sums are given.
void quantize(const LaunchContext& context,
              const std::vector<Tensor>& weights,
              const std::vector<Target>& targets,
              const double* sums,
              double* workspace) {
  const DType dtype = dtype_of(weights[0].scalar_type());
  const bool dependent = context.dependent_launch();
  int64_t layout_blocks = 0;
  for (const Tensor& weight : weights) {
    layout_blocks += block_rows(weight.size(0)) * block_cols(weight.size(1));
  }
  const int rounds = quantize_rounds(layout_blocks, context.num_sms());
  WeightTable table = {};
  const double* partials = sums != nullptr ? sums : workspace;
  const auto flush = [&] {
    if (table.count == 0) return;
    const uint32_t used = table.partials_end[table.count - 1];
    if (sums == nullptr) {
      context.check(launch_abs_sums(table, dtype, workspace, dependent, context.stream()));
      workspace += used;
    }
    context.check(launch_quantize_weights(table, dtype, partials, dependent, context.stream()));
    partials += used;
    table.count = 0;
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t N = weights[i].size(0), K = weights[i].size(1);
    const uint32_t blocks = quantize_blocks(N, K, rounds);
    const uint32_t blocks_before = table.count > 0 ? table.block_end[table.count - 1] : 0;
    if (table.count == WeightTable::kMaxWeights || blocks > INT32_MAX - blocks_before) flush();
    const int t = table.count++;
    table.weight[t] = weights[i].const_data_ptr();
    table.prepacked[t] = targets[i].prepacked;
    table.weight_scale[t] = targets[i].weight_scale;
    table.N[t] = static_cast<int32_t>(N);
    table.K[t] = static_cast<int32_t>(K);
    table.partials_end[t] =
        (t > 0 ? table.partials_end[t - 1] : 0) + static_cast<uint32_t>(absmean_partials(N * K));
    table.block_end[t] = (t > 0 ? table.block_end[t - 1] : 0) + blocks;
  }
  flush();
}

// Appends the targets of the weights [begin, end) in the buffers of their group.
void add_targets(const std::vector<Tensor>& weights,
                 size_t begin,
                 size_t end,
                 const Tensor& packed,
                 const Tensor& weight_scale,
                 std::vector<Target>& targets) {
  char* prepacked = static_cast<char*>(packed.mutable_data_ptr());
  float* scale = data<float>(weight_scale);
  for (size_t i = begin; i < end; ++i) {
    targets.push_back({prepacked, scale++});
    prepacked += block_rows(weights[i].size(0)) * block_cols(weights[i].size(1)) * kTernaryBlockBytes;
  }
}

std::tuple<Tensor, Tensor> quantize_weights(const std::vector<Tensor>& weights) {
  if (weights.empty()) fail("quantize_weights", "weights must hold at least one tensor; got an empty list");
  const LaunchContext context("quantize_weights", weights[0]);
  const int64_t rows = check_group(context, weights, 0, weights.size());
  Tensor packed = context.new_tensor(
      {block_rows(rows), block_cols(weights[0].size(1)), kLanes, kStepsPerBlock}, ScalarType::Int);
  Tensor weight_scale = context.new_tensor({static_cast<int64_t>(weights.size())}, ScalarType::Float);
  Tensor partials = context.new_tensor({partials_of(weights)}, ScalarType::Double);
  std::vector<Target> targets;
  add_targets(weights, 0, weights.size(), packed, weight_scale, targets);
  quantize(context, weights, targets, nullptr, data<double>(partials));
  return {packed, weight_scale};
}

void quantize_weight_groups_(const std::vector<Tensor>& weights,
                             const std::vector<int64_t>& group_sizes,
                             const std::vector<Tensor>& packed,
                             const std::vector<Tensor>& weight_scale,
                             const std::optional<Tensor>& abs_sums) {
  const char* op = "quantize_weight_groups_";
  check_groups(op, weights, group_sizes, packed, weight_scale);
  const LaunchContext context(op, weights[0]);
  std::vector<Target> targets;
  size_t begin = 0;
  for (size_t g = 0; g < group_sizes.size(); ++g) {
    const size_t end = begin + static_cast<size_t>(group_sizes[g]);
    const int64_t rows = check_group(context, weights, begin, end);
    const std::string name = item("packed", g), scale_name = item("weight_scale", g);
    context.check_input(name.c_str(), packed[g], ScalarType::Int);
    const std::vector<int64_t> shape = {
        block_rows(rows), block_cols(weights[begin].size(1)), kLanes, kStepsPerBlock};
    if (shape_of(packed[g]) != shape) {
      fail(op, name, " must have shape ", shape_text(shape), "; got ", shape_text(packed[g]));
    }
    if (reinterpret_cast<uintptr_t>(packed[g].const_data_ptr()) % 16 != 0) {
      fail(op, name, " must start at a multiple of 16 bytes; got another address");
    }
    context.check_input(scale_name.c_str(), weight_scale[g], ScalarType::Float);
    check_vector(op, scale_name.c_str(), weight_scale[g], group_sizes[g]);
    add_targets(weights, begin, end, packed[g], weight_scale[g], targets);
    begin = end;
  }
  if (abs_sums.has_value()) {
    context.check_input("abs_sums", *abs_sums, ScalarType::Double);
    check_vector(op, "abs_sums", *abs_sums, partials_of(weights));
    quantize(context, weights, targets, const_data<double>(*abs_sums), nullptr);
  } else {
    Tensor partials = context.new_tensor({partials_of(weights)}, ScalarType::Double);
    quantize(context, weights, targets, nullptr, data<double>(partials));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("quantize_weights", TORCH_BOX(&quantize_weights));
  m.impl("quantize_weight_groups_", TORCH_BOX(&quantize_weight_groups_));
}

}  // namespace bitnet_ext::cuda
