// The gated product act(gate) * up of a feed-forward block: to int8, as the input of a ternary product, and
// backward. A row is computed into memory that stays in the cache and quantised from there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/fused_rows.h"
#include "cpu/operators.h"
#include "row_stride.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

struct Relu2 {
  static float apply(float g) {
    const int32_t bits = bits_of(g);
    const float r = float_of(bits & (~(bits >> 31) | nan_mask(bits)));  // NaN stays
    return r * r;
  }
  static float derivative(float g) {
    return 2.0f * (g > 0.0f ? g : 0.0f * g);
  }
};

struct Silu {
  static float apply(float g) {
    return g / (1.0f + std::exp(-g));
  }
  static float derivative(float g) {
    const float sigmoid = 1.0f / (1.0f + std::exp(-g));
    return sigmoid * (1.0f + g * (1.0f - sigmoid));
  }
};

// act and the product are rounded to T, as they are when each is an operator.
template <typename Activation, typename T>
void glu_row(const T* gate, const T* up, int64_t K, T* h) {
  for (int64_t k = 0; k < K; ++k) {
    const T activated = from_float<T>(Activation::apply(to_float(gate[k])));
    h[k] = from_float<T>(to_float(activated) * to_float(up[k]));
  }
}

bool is_relu2(const char* op, const std::string& activation) {
  if (activation == "relu2") return true;
  if (activation == "silu") return false;
  fail(op, "activation must be relu2 or silu; got '", activation, "'");
}

// gate and up, [M, K] each; strides are in elements.
struct Halves {
  const void *gate, *up;
  int64_t gate_stride, up_stride;
  ScalarType dtype;
};

// `rstds` [M] is written with the norm only, and may be null.
void quantize_glu(const char* op,
                  const char* gain_arg,
                  const Halves& in,
                  bool relu2,
                  const Norm& norm,
                  int64_t M,
                  int64_t K,
                  const Tensor& x_i8,
                  const Tensor& act_scale,
                  float* rstds) {
  auto* out = static_cast<int8_t*>(x_i8.mutable_data_ptr());
  auto* scale = static_cast<float*>(act_scale.mutable_data_ptr());
  std::atomic<bool> finite{true}, zero_row{false};
  dispatch_float(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* gates = static_cast<const T*>(in.gate);
    const auto* ups = static_cast<const T*>(in.up);
    const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
    parallel_for(0, M, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      std::vector<T> h(static_cast<size_t>(K));
      for (int64_t m = begin; m < end; ++m) {
        const T* g = gates + m * in.gate_stride;
        const T* u = ups + m * in.up_stride;
        relu2 ? glu_row<Relu2>(g, u, K, h.data()) : glu_row<Silu>(g, u, K, h.data());
        float rstd = 0.0f;
        if (!quantize_row(h.data(), in.dtype, norm, K, out + m * K, scale + m, &rstd)) {
          finite = false;
          if (std::isinf(rstd)) zero_row = true;
        }
        if (rstds) rstds[m] = rstd;
      }
    });
  });
  if (!finite) fail_not_finite(op, gain_arg, "act(gate) * up", norm, K, zero_row);
}

std::tuple<Tensor, Tensor> glu_quantize(const Tensor& gate,
                                        const Tensor& up,
                                        std::string activation,
                                        const std::optional<Tensor>& gain,
                                        double eps,
                                        bool normalize) {
  const char* op = "glu_quantize";
  check_cpu(op, "gate", gate);
  check_float(op, "gate", gate);
  check_cpu(op, "up", up);
  check_dtype(op, "up", up, gate.scalar_type());
  check_same_shape(op, "up", up, "gate", gate);
  const auto [M, K, leading] = check_rows(op, "gate", gate);
  const int64_t gate_stride = check_row_stride(op, "gate", gate);
  const int64_t up_stride = check_row_stride(op, "up", up);
  const bool relu2 = is_relu2(op, activation);
  const Norm norm{normalize, optional_vector(op, "gain", gain, K), eps};
  Tensor x_i8 = new_tensor(shape_of(gate), ScalarType::Char);
  Tensor act_scale = new_tensor(leading, ScalarType::Float);
  const Halves halves{gate.const_data_ptr(), up.const_data_ptr(), gate_stride, up_stride, gate.scalar_type()};
  quantize_glu(op, "gain", halves, relu2, norm, M, K, x_i8, act_scale, nullptr);
  return {x_i8, act_scale};
}

// gate_up [.., 2 K] as its halves; sets M, K and the leading dimensions.
Halves halves_of(const char* op, const Tensor& gate_up, Rows& rows) {
  check_input(op, "gate_up", gate_up);
  rows = check_rows(op, "gate_up", gate_up);
  if (rows.K % 2 != 0) fail(op, "gate_up must have an even last dimension; got ", shape_text(gate_up));
  const int64_t stride = rows.K;
  rows.K /= 2;
  const auto* base = static_cast<const char*>(gate_up.const_data_ptr());
  return {base,
          base + rows.K * static_cast<int64_t>(gate_up.element_size()),
          stride,
          stride,
          gate_up.scalar_type()};
}

// (y, x_i8, act_scale, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> glu_bit_linear(const Tensor& gate_up,
                                                          const Tensor& weight,
                                                          const Tensor& packed,
                                                          const Tensor& weight_scale,
                                                          const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& norm_weight,
                                                          double norm_eps,
                                                          bool normalize,
                                                          std::string activation,
                                                          ScalarType out_dtype,
                                                          std::string backward) {
  const char* op = "glu_bit_linear";
  Rows rows;
  const Halves halves = halves_of(op, gate_up, rows);
  const bool relu2 = is_relu2(op, activation);
  check_stack(op, {weight}, rows.K);
  check_backward(op, backward);
  if (norm_weight && !normalize) fail(op, "norm_weight must be absent when normalize is false; got a tensor");
  const Norm norm{normalize, optional_vector(op, "norm_weight", norm_weight, rows.K), norm_eps};
  std::vector<int64_t> shape = rows.leading;
  shape.push_back(rows.K);
  Tensor x_i8 = new_tensor(shape, ScalarType::Char);
  Tensor act_scale = new_tensor(rows.leading, ScalarType::Float);
  Tensor rstd = new_tensor(normalize ? rows.leading : std::vector<int64_t>{0}, ScalarType::Float);
  auto* rstds = normalize ? static_cast<float*>(rstd.mutable_data_ptr()) : nullptr;
  quantize_glu(op, "norm_weight", halves, relu2, norm, rows.M, rows.K, x_i8, act_scale, rstds);
  Tensor y = scaled_product(op, x_i8, act_scale, packed, weight_scale, bias, {}, out_dtype);
  return {y, x_i8, act_scale, rstd};
}

// One row: grad_h [K] in fp32 to the gradients of gate and up.
template <typename Activation, typename T>
void glu_backward_row(const T* gate, const T* up, const float* grad_h, int64_t K, T* grad_gate, T* grad_up) {
  for (int64_t k = 0; k < K; ++k) {
    const float g = to_float(gate[k]);
    const float activated = to_float(from_float<T>(Activation::apply(g)));
    grad_up[k] = from_float<T>(grad_h[k] * activated);
    grad_gate[k] = from_float<T>(grad_h[k] * to_float(up[k]) * Activation::derivative(g));
  }
}

// (grad_gate_up, grad_gain)
std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad_y,
                                        const Tensor& gate_up,
                                        std::string activation,
                                        const std::optional<Tensor>& gain,
                                        const Tensor& rstd,
                                        bool normalize) {
  const char* op = "glu_backward";
  Rows rows;
  const Halves in = halves_of(op, gate_up, rows);
  const auto [M, K, leading] = rows;
  const bool relu2 = is_relu2(op, activation);
  check_input(op, "grad_y", grad_y);
  std::vector<int64_t> shape = leading;
  shape.push_back(K);
  if (shape_of(grad_y) != shape) {
    fail(op, "grad_y must have shape ", shape_text(shape), "; got ", shape_text(grad_y));
  }
  check_input(op, "rstd", rstd, ScalarType::Float);
  check_numel(op, "rstd", rstd, normalize ? M : 0);
  if (gain && !normalize) fail(op, "gain must be absent when normalize is false; got a tensor");
  const float* gains = optional_vector(op, "gain", gain, K);
  Tensor grad_gate_up = new_tensor(shape_of(gate_up), in.dtype);
  Tensor grad_gain = new_tensor({gains ? K : 0}, ScalarType::Float);
  const Kernels& table = kernels();
  const auto* dy = static_cast<const char*>(grad_y.const_data_ptr());
  const auto* rstds = static_cast<const float*>(rstd.const_data_ptr());
  const int64_t dy_row = K * static_cast<int64_t>(grad_y.element_size());
  auto* gain_sum = gains ? static_cast<float*>(grad_gain.mutable_data_ptr()) : nullptr;
  dispatch_float(in.dtype, [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* gates = static_cast<const T*>(in.gate);
    const auto* ups = static_cast<const T*>(in.up);
    auto* out = static_cast<T*>(grad_gate_up.mutable_data_ptr());
    const auto block = [&](int64_t first, int64_t count, float* partial) {
      std::vector<T> rounded(static_cast<size_t>(K));
      std::vector<float> h(static_cast<size_t>(K)), grad_h(static_cast<size_t>(K));
      for (int64_t m = first; m < first + count; ++m) {
        const T* g = gates + m * in.gate_stride;
        const T* u = ups + m * in.up_stride;
        if (normalize) {
          relu2 ? glu_row<Relu2>(g, u, K, rounded.data()) : glu_row<Silu>(g, u, K, rounded.data());
          for (int64_t k = 0; k < K; ++k)
            h[static_cast<size_t>(k)] = to_float(rounded[static_cast<size_t>(k)]);
          table.rms_norm_backward(dy + m * dy_row,
                                  dtype_of(grad_y.scalar_type()),
                                  h.data(),
                                  Dtype::kFloat32,
                                  gains,
                                  rstds + m,
                                  1,
                                  K,
                                  grad_h.data(),
                                  partial);
        } else {
          dispatch_float(grad_y.scalar_type(), [&](auto grad_zero) {
            const auto* row = reinterpret_cast<const decltype(grad_zero)*>(dy + m * dy_row);
            for (int64_t k = 0; k < K; ++k) grad_h[static_cast<size_t>(k)] = to_float(row[k]);
          });
        }
        T* grad_gate = out + m * 2 * K;
        relu2 ? glu_backward_row<Relu2>(g, u, grad_h.data(), K, grad_gate, grad_gate + K)
              : glu_backward_row<Silu>(g, u, grad_h.data(), K, grad_gate, grad_gate + K);
      }
    };
    for_row_blocks(M, K, 4 * K * static_cast<int64_t>(sizeof(T)), gain_sum, block);
  });
  return {grad_gate_up, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize));
  m.impl("glu_bit_linear", TORCH_BOX(&glu_bit_linear));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace bitnet_ext::cpu
