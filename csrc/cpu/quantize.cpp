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

// absmean = max(mean |w|, 1e-5). Sums of kSumBlock elements are added in order, whatever the number of
// threads.
float absmean(const char* op, const Tensor& weight) {
  const Kernels& table = kernels();
  const int64_t count = weight.numel();
  const int64_t blocks = (count + kSumBlock - 1) / kSumBlock;
  const int64_t block_bytes = kSumBlock * static_cast<int64_t>(weight.element_size());
  const auto* w = static_cast<const char*>(weight.const_data_ptr());
  const Dtype dtype = dtype_of(weight.scalar_type());
  std::vector<double> sums(static_cast<size_t>(blocks));
  parallel_for(0, blocks, grain_for(block_bytes), [&](int64_t begin, int64_t end) {
    table.abs_sums(w + begin * block_bytes,
                   dtype,
                   std::min(end * kSumBlock, count) - begin * kSumBlock,
                   sums.data() + begin);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  // A sum of fp32 magnitudes cannot overflow fp64, so this is the test for NaN and Inf.
  if (!std::isfinite(total)) fail(op, "weight holds NaN or Inf; accepted are finite values");
  return std::max(static_cast<float>(total / static_cast<double>(count)), 1e-5f);
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
  const float scale = absmean(op, weight);
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
  const float scale = absmean(op, weight);
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(weight.scalar_type());
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t row_bytes = K * static_cast<int64_t>(weight.element_size());
  const auto* w = static_cast<const char*>(weight.const_data_ptr());
  Tensor packed = new_tensor({N, packed_bytes(K)}, ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  parallel_for(0, N, grain_for(row_bytes), [&](int64_t begin, int64_t end) {
    table.ternary_pack(
        w + begin * row_bytes, dtype, end - begin, K, 0.5f * scale, out + begin * packed_bytes(K));
  });
  return {packed, scalar_tensor(scale)};
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("quantize_act_int8", TORCH_BOX(&quantize_act_int8));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("dequantize_act", TORCH_BOX(&dequantize_act));
  m.impl("quantize_weight_ternary", TORCH_BOX(&quantize_weight_ternary));
  m.impl("quantize_pack_weight", TORCH_BOX(&quantize_pack_weight));
}

}  // namespace bitnet_ext::cpu
