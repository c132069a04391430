// The CUDA implementations of the operators declared in csrc/ops.cpp: checks, allocation, launch.
//
// Nothing here waits for the device, copies to or from it, or allocates other than torch tensors, so every
// operator can be captured in a CUDA graph. Errors that only the data can show (NaN, Inf, a target beyond the
// vocabulary) therefore cannot throw; they make the results they touch NaN.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/adam.h"
#include "cuda/int8xint2.h"
#include "cuda/launch_context.h"
#include "cuda/pack.h"
#include "cuda/quantize_act.h"
#include "cuda/quantize_weight.h"
#include "cuda/rms_norm.h"
#include "cuda/softmax.h"
#include "packing.h"

namespace bitnet_ext::cuda {
namespace {

std::vector<int64_t> with_last(std::vector<int64_t> leading, int64_t size) {
  leading.push_back(size);
  return leading;
}

// --- quantisation ---------------------------------------------------------------------------------------

// (x_i8, act_scale, rstd); rstd is an empty [0] tensor without the norm.
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const LaunchContext& context,
                                                 const Tensor& x,
                                                 bool normalize,
                                                 const char* gain_arg,
                                                 const std::optional<Tensor>& gain,
                                                 double eps) {
  context.check_float_input("x", x);
  const Rows rows = check_rows(context.op(), "x", x);
  QuantizeActArgs args = {};
  args.gain = context.optional_vector(gain_arg, gain, rows.K);
  Tensor x_i8 = context.new_tensor(with_last(rows.leading, rows.K), ScalarType::Char);
  Tensor act_scale = context.new_tensor(rows.leading, ScalarType::Float);
  Tensor rstd = context.new_tensor(normalize ? rows.leading : std::vector<int64_t>{0}, ScalarType::Float);
  args.x = x.const_data_ptr();
  args.dtype = dtype_of(x.scalar_type());
  args.eps = eps;
  args.normalize = normalize;
  args.M = rows.M;
  args.K = rows.K;
  args.x_i8 = data<int8_t>(x_i8);
  args.act_scale = data<float>(act_scale);
  args.rstd = data<float>(rstd);
  context.check(launch_quantize_act(args, context.stream()));
  return {x_i8, act_scale, rstd};
}

// (codes or packed, weight_scale)
std::tuple<Tensor, Tensor> quantize_weight(const LaunchContext& context, const Tensor& weight, bool pack) {
  context.check_float_input("weight", weight);
  check_matrix(context.op(), "weight", weight);
  const int64_t N = weight.size(0), K = weight.size(1);
  Tensor out = pack ? context.new_tensor({N, packed_bytes(K)}, ScalarType::Byte)
                    : context.new_tensor({N, K}, ScalarType::Char);
  Tensor weight_scale = context.new_tensor({}, ScalarType::Float);
  Tensor partials = context.new_tensor({absmean_partials(N * K)}, ScalarType::Double);
  QuantizeWeightArgs args = {};
  args.weight = weight.const_data_ptr();
  args.dtype = dtype_of(weight.scalar_type());
  args.N = N;
  args.K = K;
  args.partials = data<double>(partials);
  args.codes = pack ? nullptr : data<int8_t>(out);
  args.packed = pack ? data<uint8_t>(out) : nullptr;
  args.weight_scale = data<float>(weight_scale);
  context.check(launch_quantize_weight(args, context.stream()));
  return {out, weight_scale};
}

std::tuple<Tensor, Tensor> quantize_act_int8(const Tensor& x) {
  const LaunchContext context("quantize_act_int8", x);
  auto [x_i8, act_scale, rstd] = quantize_rows(context, x, false, "gain", std::nullopt, 0.0);
  return {x_i8, act_scale};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x,
                                                     const std::optional<Tensor>& gain,
                                                     double eps) {
  const LaunchContext context("rms_norm_quantize", x);
  return quantize_rows(context, x, true, "gain", gain, eps);
}

std::tuple<Tensor, Tensor> quantize_weight_ternary(const Tensor& weight) {
  return quantize_weight(LaunchContext("quantize_weight_ternary", weight), weight, false);
}

std::tuple<Tensor, Tensor> quantize_pack_weight(const Tensor& weight) {
  return quantize_weight(LaunchContext("quantize_pack_weight", weight), weight, true);
}

// --- packing --------------------------------------------------------------------------------------------

Tensor pack_ternary(const Tensor& codes) {
  const LaunchContext context("pack_ternary", codes);
  context.check_input("codes", codes, ScalarType::Char);
  check_matrix(context.op(), "codes", codes);
  const int64_t N = codes.size(0), K = codes.size(1);
  Tensor packed = context.new_tensor({N, packed_bytes(K)}, ScalarType::Byte);
  context.check(
      launch_pack_ternary(const_data<int8_t>(codes), N, K, data<uint8_t>(packed), context.stream()));
  return packed;
}

Tensor unpack_ternary(const Tensor& packed, int64_t K) {
  const LaunchContext context("unpack_ternary", packed);
  check_packed(context.op(), packed, K);
  const int64_t N = packed.size(0);
  Tensor codes = context.new_tensor({N, K}, ScalarType::Char);
  context.check(
      launch_unpack_ternary(const_data<uint8_t>(packed), N, K, data<int8_t>(codes), context.stream()));
  return codes;
}

Tensor dequantize_ternary(const Tensor& packed, const Tensor& weight_scale, int64_t K, ScalarType dtype) {
  const LaunchContext context("dequantize_ternary", packed);
  check_packed(context.op(), packed, K);
  context.check_input("weight_scale", weight_scale, ScalarType::Float);
  check_out_dtype(context.op(), "dtype", dtype);
  const int64_t N = packed.size(0), scales = weight_scale.numel();
  if (scales != 1 && scales != N) {
    fail(context.op(), "weight_scale must have 1 or N = ", N, " element(s); got ", scales);
  }
  Tensor out = context.new_tensor({N, K}, dtype);
  context.check(launch_dequantize_ternary(const_data<uint8_t>(packed),
                                          const_data<float>(weight_scale),
                                          scales != 1,
                                          N,
                                          K,
                                          dtype_of(dtype),
                                          out.mutable_data_ptr(),
                                          context.stream()));
  return out;
}

Tensor dequantize_act(const Tensor& x_i8, const Tensor& act_scale, ScalarType dtype) {
  const LaunchContext context("dequantize_act", x_i8);
  context.check_input("x_i8", x_i8, ScalarType::Char);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_out_dtype(context.op(), "dtype", dtype);
  const Rows rows = check_rows(context.op(), "x_i8", x_i8);
  check_numel(context.op(), "act_scale", act_scale, rows.M);
  Tensor out = context.new_tensor(with_last(rows.leading, rows.K), dtype);
  context.check(launch_dequantize_act(const_data<int8_t>(x_i8),
                                      const_data<float>(act_scale),
                                      rows.M,
                                      rows.K,
                                      dtype_of(dtype),
                                      out.mutable_data_ptr(),
                                      context.stream()));
  return out;
}

// --- products -------------------------------------------------------------------------------------------

void launch_product(const LaunchContext& context, const Int8xInt2Args& args) {
  context.check(args.M <= kGemvMaxM ? launch_int8xint2_gemv(args, context.num_sms(), context.stream())
                                    : launch_sm80_int8xint2_gemm(args, context.num_sms(), context.stream()));
}

// The operands of a product and the shape [.., N] of its result.
std::vector<int64_t> check_operands(const LaunchContext& context,
                                    const Tensor& x_i8,
                                    const Tensor& packed,
                                    Int8xInt2Args& args) {
  // 128 * K is the largest sum; beyond this K it could leave int32.
  constexpr int64_t kMaxK = INT32_MAX / 128;
  context.check_input("x_i8", x_i8, ScalarType::Char);
  const Rows rows = check_rows(context.op(), "x_i8", x_i8);
  if (rows.K > kMaxK) fail(context.op(), "x_i8 must have K <= ", kMaxK, "; got ", rows.K);
  check_cuda(context.op(), "packed", packed, context.device());
  check_packed(context.op(), packed, rows.K);
  args.x_i8 = const_data<int8_t>(x_i8);
  args.packed = const_data<uint8_t>(packed);
  args.M = rows.M;
  args.N = packed.size(0);
  args.K = rows.K;
  return with_last(rows.leading, args.N);
}

Tensor int8xint2_mm_int32(const Tensor& x_i8, const Tensor& packed) {
  const LaunchContext context("int8xint2_mm_int32", x_i8);
  Int8xInt2Args args = {};
  const std::vector<int64_t> shape = check_operands(context, x_i8, packed, args);
  Tensor out = context.new_tensor(shape, ScalarType::Int);
  args.raw = true;
  args.out = out.mutable_data_ptr();
  launch_product(context, args);
  return out;
}

Tensor scaled_product(const LaunchContext& context,
                      const Tensor& x_i8,
                      const Tensor& act_scale,
                      const Tensor& packed,
                      const Tensor& weight_scale,
                      const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& segments,
                      ScalarType out_dtype) {
  Int8xInt2Args args = {};
  const std::vector<int64_t> shape = check_operands(context, x_i8, packed, args);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_numel(context.op(), "act_scale", act_scale, args.M);
  check_cuda(context.op(), "weight_scale", weight_scale, context.device());
  check_weight_scale(context.op(), weight_scale, args.N, segments);
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  args.bias = context.optional_vector("bias", bias, args.N);
  args.act_scale = const_data<float>(act_scale);
  args.weight_scale = const_data<float>(weight_scale);
  args.scale_per_row = segments.empty() && weight_scale.numel() != 1;
  args.num_segments = std::max<int>(1, static_cast<int>(segments.size()));
  args.segment_end[0] = args.N;
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) args.segment_end[i] = end += segments[i];
  Tensor out = context.new_tensor(shape, out_dtype);
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out_dtype);
  launch_product(context, args);
  return out;
}

Tensor int8xint2_mm(const Tensor& x_i8,
                    const Tensor& act_scale,
                    const Tensor& packed,
                    const Tensor& weight_scale,
                    const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& segments,
                    ScalarType out_dtype) {
  const LaunchContext context("int8xint2_mm", x_i8);
  return scaled_product(context, x_i8, act_scale, packed, weight_scale, bias, segments, out_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bit_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight,
    double norm_eps,
    bool normalize,
    ScalarType out_dtype) {
  const LaunchContext context("bit_linear", x);
  // What the parts would report about their own inputs is checked here in terms of this operator's.
  check_matrix(context.op(), "weight", weight);
  const Rows rows = check_rows(context.op(), "x", x);
  if (rows.K != weight.size(1)) {
    fail(context.op(),
         "x must have K = ",
         weight.size(1),
         " like weight ",
         shape_text(weight),
         "; got ",
         shape_text(x));
  }
  if (norm_weight.has_value() && !normalize) {
    fail(context.op(), "norm_weight must be absent when normalize is false; got a tensor");
  }
  context.optional_vector("bias", bias, weight.size(0));
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  auto [x_i8, act_scale, rstd] = quantize_rows(context, x, normalize, "norm_weight", norm_weight, norm_eps);
  auto [packed, weight_scale] = quantize_weight(context, weight, true);
  Tensor y = scaled_product(context, x_i8, act_scale, packed, weight_scale, bias, {}, out_dtype);
  return {y, x_i8, act_scale, rstd, packed, weight_scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                             const Tensor& x,
                                             const std::optional<Tensor>& gain,
                                             const Tensor& rstd) {
  const LaunchContext context("rms_norm_backward", grad_y);
  context.check_float_input("grad_y", grad_y);
  context.check_float_input("x", x);
  check_same_shape(context.op(), "grad_y", grad_y, "x", x);
  context.check_input("rstd", rstd, ScalarType::Float);
  const Rows rows = check_rows(context.op(), "x", x);
  check_numel(context.op(), "rstd", rstd, rows.M);
  RmsNormBackwardArgs args = {};
  args.gain = context.optional_vector("gain", gain, rows.K);
  const bool has_gain = args.gain != nullptr;
  const int64_t row_blocks = gain_row_blocks(rows.M);
  Tensor grad_x = context.new_tensor(with_last(rows.leading, rows.K), x.scalar_type());
  Tensor grad_gain = context.new_tensor({has_gain ? rows.K : 0}, ScalarType::Float);
  std::optional<Tensor> partials;
  if (has_gain && row_blocks > 1) partials = context.new_tensor({row_blocks, rows.K}, ScalarType::Float);
  args.grad_y = grad_y.const_data_ptr();
  args.grad_dtype = dtype_of(grad_y.scalar_type());
  args.x = x.const_data_ptr();
  args.x_dtype = dtype_of(x.scalar_type());
  args.rstd = const_data<float>(rstd);
  args.M = rows.M;
  args.K = rows.K;
  args.grad_x = grad_x.mutable_data_ptr();
  args.partials = partials.has_value() ? data<float>(*partials) : nullptr;
  args.grad_gain = has_gain ? data<float>(grad_gain) : nullptr;
  context.check(launch_rms_norm_backward(args, context.stream()));
  return {grad_x, grad_gain};
}

// --- optimiser ------------------------------------------------------------------------------------------

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

// --- loss -----------------------------------------------------------------------------------------------

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
  m.impl("quantize_act_int8", TORCH_BOX(&quantize_act_int8));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("quantize_weight_ternary", TORCH_BOX(&quantize_weight_ternary));
  m.impl("quantize_pack_weight", TORCH_BOX(&quantize_pack_weight));
  m.impl("pack_ternary", TORCH_BOX(&pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&unpack_ternary));
  m.impl("dequantize_ternary", TORCH_BOX(&dequantize_ternary));
  m.impl("dequantize_act", TORCH_BOX(&dequantize_act));
  m.impl("int8xint2_mm_int32", TORCH_BOX(&int8xint2_mm_int32));
  m.impl("int8xint2_mm", TORCH_BOX(&int8xint2_mm));
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
  m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_));
}

}  // namespace bitnet_ext::cuda
