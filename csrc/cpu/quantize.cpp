// Operators that quantise activations and weights and that undo it; RMSNorm goes with them because its output
// is quantised before it reaches memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> quantize_act(const char* op, const Tensor& x) {
  check_input(op, "x", x);
  const auto [M, K, leading] = check_rows(op, "x", x);
  Tensor x_i8 = new_tensor(shape_of(x), ScalarType::Char);
  Tensor act_scale = new_tensor(leading, ScalarType::Float);
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(x.scalar_type());
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  auto* out = static_cast<int8_t*>(x_i8.mutable_data_ptr());
  auto* scale = static_cast<float*>(act_scale.mutable_data_ptr());
  const int64_t row_bytes = K * static_cast<int64_t>(x.element_size());
  std::atomic<bool> finite{true};
  parallel_for(0, M, grain_for(row_bytes), [&, K = K](int64_t begin, int64_t end) {
    if (!table.quantize_act(in + begin * row_bytes, dtype, end - begin, K, out + begin * K, scale + begin))
      finite = false;
  });
  if (!finite) fail(op, "x holds NaN or Inf; accepted are finite values");
  return {x_i8, act_scale};
}

std::tuple<Tensor, Tensor, Tensor> normalize_and_quantize(
    const char* op, const Tensor& x, const char* gain_arg, const std::optional<Tensor>& gain, double eps) {
  check_input(op, "x", x);
  const auto [M, K, leading] = check_rows(op, "x", x);
  const float* gains = optional_vector(op, gain_arg, gain, K);
  Tensor x_i8 = new_tensor(shape_of(x), ScalarType::Char);
  Tensor act_scale = new_tensor(leading, ScalarType::Float);
  Tensor rstd = new_tensor(leading, ScalarType::Float);
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(x.scalar_type());
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  auto* out = static_cast<int8_t*>(x_i8.mutable_data_ptr());
  auto* scale = static_cast<float*>(act_scale.mutable_data_ptr());
  auto* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  const int64_t row_bytes = K * static_cast<int64_t>(x.element_size());
  std::atomic<bool> finite{true};
  parallel_for(0, M, grain_for(row_bytes), [&, K = K](int64_t begin, int64_t end) {
    if (!table.rms_norm_quantize(in + begin * row_bytes,
                                 dtype,
                                 gains,
                                 eps,
                                 end - begin,
                                 K,
                                 out + begin * K,
                                 scale + begin,
                                 rstds + begin)) {
      finite = false;
    }
  });
  if (!finite) {
    const bool gain_finite =
        !gains || std::all_of(gains, gains + K, [](float g) { return std::isfinite(g); });
    if (!gain_finite) fail(op, gain_arg, " holds NaN or Inf; accepted are finite values");
    if (std::any_of(rstds, rstds + M, [](float r) { return std::isinf(r); })) fail_zero_row(op, gain_arg);
    fail(op,
         "x holds NaN or Inf",
         gains ? " (by itself or multiplied by the gain)" : "",
         "; accepted are finite values");
  }
  return {x_i8, act_scale, rstd};
}

namespace {

std::tuple<Tensor, Tensor> quantize_act_int8(const Tensor& x) {
  return quantize_act("quantize_act_int8", x);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x,
                                                     const std::optional<Tensor>& gain,
                                                     double eps) {
  return normalize_and_quantize("rms_norm_quantize", x, "gain", gain, eps);
}

Tensor dequantize_act(const Tensor& x_i8, const Tensor& act_scale, ScalarType dtype) {
  const char* op = "dequantize_act";
  check_input(op, "x_i8", x_i8, ScalarType::Char);
  check_input(op, "act_scale", act_scale, ScalarType::Float);
  check_out_dtype(op, "dtype", dtype);
  const auto [M, K, leading] = check_rows(op, "x_i8", x_i8);
  check_numel(op, "act_scale", act_scale, M);
  Tensor y = new_tensor(shape_of(x_i8), dtype);
  const Kernels& table = kernels();
  const auto* in = static_cast<const int8_t*>(x_i8.const_data_ptr());
  const auto* scale = static_cast<const float*>(act_scale.const_data_ptr());
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t row_bytes = K * static_cast<int64_t>(y.element_size());
  parallel_for(0, M, grain_for(row_bytes), [&, K = K](int64_t begin, int64_t end) {
    table.dequantize_act(
        in + begin * K, scale + begin, end - begin, K, dtype_of(dtype), out + begin * row_bytes);
  });
  return y;
}

// max(mean |w|, 1e-5) from the sums of kSumBlock elements each, added in order.
float absmean_of(const char* op, const char* arg, const double* sums, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < abs_sums_of(count); ++i) total += sums[i];
  // A sum of fp32 magnitudes cannot overflow fp64, so this is the test for NaN and Inf.
  if (!std::isfinite(total)) fail(op, arg, " holds NaN or Inf; accepted are finite values");
  return std::max(static_cast<float>(total / static_cast<double>(count)), 1e-5f);
}

// The same sums whatever the number of threads.
float absmean(const char* op, const char* arg, const Tensor& weight) {
  const Kernels& table = kernels();
  const int64_t count = weight.numel();
  const int64_t block_bytes = kSumBlock * static_cast<int64_t>(weight.element_size());
  const auto* w = static_cast<const char*>(weight.const_data_ptr());
  const Dtype dtype = dtype_of(weight.scalar_type());
  std::vector<double> sums(static_cast<size_t>(abs_sums_of(count)));
  parallel_for(0, abs_sums_of(count), grain_for(block_bytes), [&](int64_t begin, int64_t end) {
    table.abs_sums(w + begin * block_bytes,
                   dtype,
                   std::min(end * kSumBlock, count) - begin * kSumBlock,
                   sums.data() + begin);
  });
  return absmean_of(op, arg, sums.data(), count);
}

// The codes of weight [N, K] as packed bytes.
void pack_codes(const Tensor& weight, float scale, uint8_t* packed) {
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(weight.scalar_type());
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t row_bytes = K * static_cast<int64_t>(weight.element_size());
  const auto* w = static_cast<const char*>(weight.const_data_ptr());
  parallel_for(0, N, grain_for(row_bytes), [&](int64_t begin, int64_t end) {
    table.ternary_pack(
        w + begin * row_bytes, dtype, end - begin, K, 0.5f * scale, packed + begin * packed_bytes(K));
  });
}

Tensor scalar_tensor(float value) {
  Tensor t = new_tensor({}, ScalarType::Float);
  *static_cast<float*>(t.mutable_data_ptr()) = value;
  return t;
}

std::tuple<Tensor, Tensor> quantize_weight_ternary(const Tensor& weight) {
  const char* op = "quantize_weight_ternary";
  check_input(op, "weight", weight);
  check_matrix(op, "weight", weight);
  const float scale = absmean(op, "weight", weight);
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(weight.scalar_type());
  const int64_t element_bytes = static_cast<int64_t>(weight.element_size());
  const auto* w = static_cast<const char*>(weight.const_data_ptr());
  Tensor codes = new_tensor(shape_of(weight), ScalarType::Char);
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  parallel_for(0, weight.numel(), grain_for(element_bytes), [&](int64_t begin, int64_t end) {
    table.ternary_codes(w + begin * element_bytes, dtype, end - begin, 0.5f * scale, out + begin);
  });
  return {codes, scalar_tensor(scale)};
}

std::tuple<Tensor, Tensor> quantize_pack_weight(const Tensor& weight) {
  return quantize_and_pack("quantize_pack_weight", weight);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_and_pack(const char* op, const Tensor& weight) {
  check_input(op, "weight", weight);
  check_matrix(op, "weight", weight);
  const float scale = absmean(op, "weight", weight);
  Tensor packed = new_tensor({weight.size(0), packed_bytes(weight.size(1))}, ScalarType::Byte);
  pack_codes(weight, scale, static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return {packed, scalar_tensor(scale)};
}

namespace {

std::string item(const char* arg, size_t i) {
  return std::string(arg) + "[" + std::to_string(i) + "]";
}

// Checks the weights [begin, end), which are stacked along N, and returns the rows of the stack.
int64_t check_group(const char* op, const std::vector<Tensor>& weights, size_t begin, size_t end) {
  int64_t rows = 0;
  for (size_t i = begin; i < end; ++i) {
    const std::string name = item("weights", i);
    check_input(op, name.c_str(), weights[i]);
    check_dtype(op, name.c_str(), weights[i], weights[0].scalar_type());
    check_matrix(op, name.c_str(), weights[i]);
    if (weights[i].size(1) != weights[begin].size(1)) {
      fail(op,
           name,
           " must have K = ",
           weights[begin].size(1),
           " like ",
           item("weights", begin),
           "; got ",
           shape_text(weights[i]));
    }
    rows += weights[i].size(0);
  }
  return rows;
}

// The weights [begin, end) into the stack `packed`; `sums` may be null.
void quantize_group(const char* op,
                    const std::vector<Tensor>& weights,
                    size_t begin,
                    size_t end,
                    const double* sums,
                    const Tensor& packed,
                    const Tensor& weight_scale) {
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* scales = static_cast<float*>(weight_scale.mutable_data_ptr());
  for (size_t i = begin; i < end; ++i) {
    const Tensor& weight = weights[i];
    const std::string name = item("weights", i);
    const float scale =
        sums ? absmean_of(op, name.c_str(), sums, weight.numel()) : absmean(op, name.c_str(), weight);
    if (sums) sums += abs_sums_of(weight.numel());
    pack_codes(weight, scale, out);
    out += weight.size(0) * packed_bytes(weight.size(1));
    *scales++ = scale;
  }
}

std::tuple<Tensor, Tensor> quantize_weights(const std::vector<Tensor>& weights) {
  const char* op = "quantize_weights";
  if (weights.empty()) fail(op, "weights must hold at least one tensor; got an empty list");
  const int64_t rows = check_group(op, weights, 0, weights.size());
  Tensor packed = new_tensor({rows, packed_bytes(weights[0].size(1))}, ScalarType::Byte);
  Tensor weight_scale = new_tensor({static_cast<int64_t>(weights.size())}, ScalarType::Float);
  quantize_group(op, weights, 0, weights.size(), nullptr, packed, weight_scale);
  return {packed, weight_scale};
}

void quantize_weight_groups_(const std::vector<Tensor>& weights,
                             const std::vector<int64_t>& group_sizes,
                             const std::vector<Tensor>& packed,
                             const std::vector<Tensor>& weight_scale,
                             const std::optional<Tensor>& abs_sums) {
  const char* op = "quantize_weight_groups_";
  check_groups(op, weights, group_sizes, packed, weight_scale);
  size_t begin = 0;
  int64_t num_sums = 0;
  for (size_t g = 0; g < group_sizes.size(); ++g) {
    const size_t end = begin + static_cast<size_t>(group_sizes[g]);
    const int64_t rows = check_group(op, weights, begin, end);
    const std::string name = item("packed", g), scale_name = item("weight_scale", g);
    check_input(op, name.c_str(), packed[g], ScalarType::Byte);
    const std::vector<int64_t> shape = {rows, packed_bytes(weights[begin].size(1))};
    if (shape_of(packed[g]) != shape) {
      fail(op, name, " must have shape ", shape_text(shape), "; got ", shape_text(packed[g]));
    }
    check_input(op, scale_name.c_str(), weight_scale[g], ScalarType::Float);
    check_vector(op, scale_name.c_str(), weight_scale[g], group_sizes[g]);
    for (; begin < end; ++begin) num_sums += abs_sums_of(weights[begin].numel());
  }
  const double* sums = nullptr;
  if (abs_sums.has_value()) {
    check_input(op, "abs_sums", *abs_sums, ScalarType::Double);
    check_vector(op, "abs_sums", *abs_sums, num_sums);
    sums = static_cast<const double*>(abs_sums->const_data_ptr());
  }
  begin = 0;
  for (size_t g = 0; g < group_sizes.size(); ++g) {
    const size_t end = begin + static_cast<size_t>(group_sizes[g]);
    quantize_group(op, weights, begin, end, sums, packed[g], weight_scale[g]);
    for (; begin < end; ++begin) {
      if (sums) sums += abs_sums_of(weights[begin].numel());
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("quantize_act_int8", TORCH_BOX(&quantize_act_int8));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("dequantize_act", TORCH_BOX(&dequantize_act));
  m.impl("quantize_weight_ternary", TORCH_BOX(&quantize_weight_ternary));
  m.impl("quantize_pack_weight", TORCH_BOX(&quantize_pack_weight));
  m.impl("quantize_weights", TORCH_BOX(&quantize_weights));
  m.impl("quantize_weight_groups_", TORCH_BOX(&quantize_weight_groups_));
}

}  // namespace bitnet_ext::cpu
