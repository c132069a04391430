// The operators of the int8 backward: the gradient in 8 bits, transposes, and the product over tokens.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/int8_gradient.h"
#include "cuda/launch_context.h"
#include "cuda/ops/flag_slots.h"
#include "cuda/quantize_grad.h"
#include "cuda/sm90_gemm.h"
#include "cuda/sm90_int8_gemm.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

// (g_row [M, N], row_scale [M], g_column [N, width], order [width], stage_bound [width / 128],
// column_max [N]); empty [0] tensors for what is not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad(const Tensor& grad_y,
                                                                         const Tensor& act_scale,
                                                                         const Tensor& weight_scale,
                                                                         const std::vector<int64_t>& segments,
                                                                         const Tensor& seed,
                                                                         bool by_row,
                                                                         bool by_column) {
  const LaunchContext context("quantize_grad", grad_y);
  context.check_float_input("grad_y", grad_y);
  check_matrix(context.op(), "grad_y", grad_y);
  QuantizeGradArgs args = {};
  args.M = grad_y.size(0);
  args.N = grad_y.size(1);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_numel(context.op(), "act_scale", act_scale, args.M);
  check_cuda(context.op(), "weight_scale", weight_scale, context.device());
  check_weight_scale(context.op(), weight_scale, args.N, segments);
  context.check_input("seed", seed, ScalarType::Long);
  check_numel(context.op(), "seed", seed, 1);
  if (!by_row && !by_column) fail(context.op(), "by_row or by_column must be true; got false for both");
  if (by_column && args.M > kMaxPrepackedInt8K) {
    fail(context.op(), "grad_y must have at most ", kMaxPrepackedInt8K, " rows; got ", args.M);
  }
  const int64_t width = padded_tokens(args.M);
  Tensor g_row = context.new_tensor(by_row ? std::vector<int64_t>{args.M, args.N} : std::vector<int64_t>{0},
                                    ScalarType::Char);
  Tensor row_scale = context.new_tensor({by_row ? args.M : 0}, ScalarType::Float);
  Tensor g_column = context.new_tensor(
      by_column ? std::vector<int64_t>{args.N, width} : std::vector<int64_t>{0}, ScalarType::Char);
  Tensor order = context.new_tensor({by_column ? width : 0}, ScalarType::Int);
  Tensor stage_bound = context.new_tensor({by_column ? width / kStageTokens : 0}, ScalarType::Float);
  Tensor column_max = context.new_tensor({by_column ? args.N : 0}, ScalarType::Float);
  Tensor maxima = context.new_tensor({2, args.M}, ScalarType::Int);
  args.grad = grad_y.const_data_ptr();
  args.dtype = dtype_of(grad_y.scalar_type());
  args.act_scale = const_data<float>(act_scale);
  args.weight_scale = const_data<float>(weight_scale);
  args.scale_per_row = segments.empty() && weight_scale.numel() != 1;
  args.num_segments = segments.empty() ? 1 : static_cast<int>(segments.size());
  args.segment_end[0] = args.N;
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) args.segment_end[i] = end += segments[i];
  args.seed = const_data<int64_t>(seed);
  if (by_row) {
    args.by_row = data<int8_t>(g_row);
    args.row_scale = data<float>(row_scale);
  }
  if (by_column) {
    args.by_column = data<int8_t>(g_column);
    args.order = data<int32_t>(order);
    args.stage_bound = data<float>(stage_bound);
    args.column_max = data<float>(column_max);
  }
  args.row_max = static_cast<uint32_t*>(maxima.mutable_data_ptr());
  args.token_max = args.row_max + args.M;
  context.check(launch_quantize_grad(args, context.dependent_launch(), context.stream()));
  return {g_row, row_scale, g_column, order, stage_bound, column_max};
}

Tensor transpose_prepacked(const Tensor& prepacked, int64_t N, int64_t K) {
  const LaunchContext context("transpose_prepacked", prepacked);
  context.check_input("prepacked", prepacked, ScalarType::Int);
  if (N < 1 || K < 1) fail(context.op(), "N and K must be >= 1; got ", N, " and ", K);
  const std::vector<int64_t> shape = {block_rows(N), block_cols(K), kLanes, kStepsPerBlock};
  if (shape_of(prepacked) != shape || reinterpret_cast<uintptr_t>(prepacked.const_data_ptr()) % 16 != 0) {
    fail(context.op(),
         "prepacked must have shape ",
         shape_text(shape),
         " and begin at a multiple of 16 bytes; got ",
         shape_text(prepacked));
  }
  Tensor out = context.new_tensor({block_rows(K), block_cols(N), kLanes, kStepsPerBlock}, ScalarType::Int);
  context.check(
      launch_transpose_prepacked(prepacked.const_data_ptr(), N, K, out.mutable_data_ptr(), context.stream()));
  return out;
}

Tensor transpose_int8(const Tensor& x_i8, const std::optional<Tensor>& order) {
  const LaunchContext context("transpose_int8", x_i8);
  context.check_input("x_i8", x_i8, ScalarType::Char);
  check_matrix(context.op(), "x_i8", x_i8);
  const int64_t M = x_i8.size(0), K = x_i8.size(1);
  int64_t width = M;
  if (order.has_value()) {
    context.check_input("order", *order, ScalarType::Int);
    width = order->numel();
  }
  Tensor out = context.new_tensor({K, width}, ScalarType::Char);
  context.check(launch_transpose_int8(const_data<int8_t>(x_i8),
                                      M,
                                      K,
                                      order.has_value() ? const_data<int32_t>(*order) : nullptr,
                                      width,
                                      data<int8_t>(out),
                                      context.stream()));
  return out;
}

Tensor int8_weight_grad(const Tensor& g_column,
                        const Tensor& x_column,
                        const Tensor& column_max,
                        const Tensor& stage_bound,
                        ScalarType out_dtype) {
  const LaunchContext context("int8_weight_grad", g_column);
  const char* op = context.op();
  if (context.compute_capability() != 90 || !sm90_is_compiled()) {
    fail(op, "needs a GPU of compute capability 9.0 and a build with 90a among its architectures");
  }
  context.check_input("g_column", g_column, ScalarType::Char);
  context.check_input("x_column", x_column, ScalarType::Char);
  check_matrix(op, "g_column", g_column);
  check_matrix(op, "x_column", x_column);
  Int8GemmArgs args = {};
  args.rows = g_column.size(0);
  args.cols = x_column.size(0);
  args.depth = g_column.size(1);
  if (args.depth % kStageTokens != 0 || x_column.size(1) != args.depth) {
    fail(op,
         "g_column and x_column must have the same second size, a multiple of ",
         kStageTokens,
         "; got ",
         shape_text(g_column),
         " and ",
         shape_text(x_column));
  }
  context.check_input("column_max", column_max, ScalarType::Float);
  check_numel(op, "column_max", column_max, args.rows);
  context.check_input("stage_bound", stage_bound, ScalarType::Float);
  check_numel(op, "stage_bound", stage_bound, args.depth / kStageTokens);
  check_out_dtype(op, "out_dtype", out_dtype);
  args.a = const_data<int8_t>(g_column);
  args.b = const_data<int8_t>(x_column);
  if (reinterpret_cast<uintptr_t>(args.a) % 16 != 0 || reinterpret_cast<uintptr_t>(args.b) % 16 != 0) {
    fail(op, "g_column and x_column must begin at multiples of 16 bytes; got a view that does not");
  }
  args.column_max = const_data<float>(column_max);
  args.stage_bound = const_data<float>(stage_bound);
  Tensor out = context.new_tensor({args.rows, args.cols}, out_dtype);
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out_dtype);
  args.dependent_launch = context.dependent_launch();
  Int8GemmPlan plan = int8_gemm_plan(args.rows, args.cols, args.depth, context.num_sms());
  std::optional<Tensor> partials;
  if (plan.split_tiles > 0) {
    args.flags = flag_slots().slot(op, context.device(), context.stream());
    if (args.flags == nullptr) {  // no slot is left for this capture: whole tiles need none
      plan = int8_gemm_whole_plan(args.rows, args.cols, context.num_sms());
    } else {
      partials = context.new_tensor({int8_gemm_partials(plan)}, ScalarType::Int);
      args.partials = data<int32_t>(*partials);
    }
  }
  context.check(launch_sm90_int8_gemm(args, plan, context.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("quantize_grad", TORCH_BOX(&quantize_grad));
  m.impl("transpose_prepacked", TORCH_BOX(&transpose_prepacked));
  m.impl("transpose_int8", TORCH_BOX(&transpose_int8));
  m.impl("int8_weight_grad", TORCH_BOX(&int8_weight_grad));
}

}  // namespace bitnet_ext::cuda
