// Operators that end in int8 activations and take in what stands before the quantiser in a transformer block.
// A row is computed into memory that stays in the cache and quantised from there, so that both give what the
// separate operators give.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/operators.h"
#include "row_stride.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

// Calls body(T{}) for the element type of `dtype`.
template <typename Body>
void dispatch_float(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    case ScalarType::Half:
      return body(c10::Half{});
    default:
      return body(0.0f);
  }
}

inline int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// -1 for NaN, else 0. Selections here are by masks: a branch in a loop keeps compilers from vectorising it.
inline int32_t nan_mask(int32_t bits) {
  return (0x7f800000 - (bits & 0x7fffffff)) >> 31;
}

template <typename T>
float to_float(T v) {
  return static_cast<float>(v);
}
inline float to_float(c10::BFloat16 v) {
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(v.x) << 16));
}

// Rounds to nearest even.
template <typename T>
T from_float(float v) {
  return static_cast<T>(v);
}
template <>
inline c10::BFloat16 from_float<c10::BFloat16>(float v) {
  const int32_t bits = bits_of(v), nan = nan_mask(bits);
  const uint32_t word = static_cast<uint32_t>(bits);
  const uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1)) >> 16;
  const uint32_t out = (rounded & static_cast<uint32_t>(~nan)) | (0x7fc0u & static_cast<uint32_t>(nan));
  return c10::BFloat16(static_cast<uint16_t>(out), c10::BFloat16::from_bits());
}

struct Norm {
  bool enabled;
  const float* gain;  // [K] or null
  double eps;
};

bool quantize_row(
    const void* row, ScalarType dtype, const Norm& norm, int64_t K, int8_t* x_i8, float* act_scale) {
  const Kernels& table = kernels();
  if (!norm.enabled) return table.quantize_act(row, dtype_of(dtype), 1, K, x_i8, act_scale);
  float rstd = 0.0f;
  return table.rms_norm_quantize(row, dtype_of(dtype), norm.gain, norm.eps, 1, K, x_i8, act_scale, &rstd);
}

[[noreturn]] void fail_not_finite(const char* op, const char* what, const Norm& norm, int64_t K) {
  const bool has_gain = norm.enabled && norm.gain != nullptr;
  if (has_gain && !std::all_of(norm.gain, norm.gain + K, [](float g) { return std::isfinite(g); })) {
    fail(op, "gain holds NaN or Inf; accepted are finite values");
  }
  fail(op,
       what,
       " holds NaN or Inf",
       has_gain ? " (by itself or multiplied by the gain)" : "",
       "; accepted are finite values");
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x,
                                                         const Tensor& residual,
                                                         const std::optional<Tensor>& gain,
                                                         double eps) {
  const char* op = "add_rms_norm_quantize";
  check_input(op, "x", x);
  check_input(op, "residual", residual, x.scalar_type());
  check_same_shape(op, "residual", residual, "x", x);
  const auto [M, K, leading] = check_rows(op, "x", x);
  const Norm norm{true, optional_vector(op, "gain", gain, K), eps};
  const ScalarType dtype = x.scalar_type();
  Tensor x_i8 = new_tensor(shape_of(x), ScalarType::Char);
  Tensor act_scale = new_tensor(leading, ScalarType::Float);
  Tensor sum = new_tensor(shape_of(x), dtype);
  auto* out = static_cast<int8_t*>(x_i8.mutable_data_ptr());
  auto* scale = static_cast<float*>(act_scale.mutable_data_ptr());
  std::atomic<bool> finite{true};
  dispatch_float(dtype, [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* a = static_cast<const T*>(x.const_data_ptr());
    const auto* b = static_cast<const T*>(residual.const_data_ptr());
    auto* sums = static_cast<T*>(sum.mutable_data_ptr());
    const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
    parallel_for(0, M, grain_for(3 * row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = m * K; i < (m + 1) * K; ++i) {
          sums[i] = from_float<T>(to_float(a[i]) + to_float(b[i]));
        }
        if (!quantize_row(sums + m * K, dtype, norm, K, out + m * K, scale + m)) finite = false;
      }
    });
  });
  if (!finite) fail_not_finite(op, "x + residual", norm, K);
  return {x_i8, act_scale, sum};
}

struct Relu2 {
  static float apply(float g) {
    const int32_t bits = bits_of(g);
    const float r = float_of(bits & (~(bits >> 31) | nan_mask(bits)));  // NaN stays
    return r * r;
  }
};

struct Silu {
  static float apply(float g) {
    return g / (1.0f + std::exp(-g));
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
  const bool relu2 = activation == "relu2";
  if (!relu2 && activation != "silu") {
    fail(op, "activation must be relu2 or silu; got '", activation, "'");
  }
  const Norm norm{normalize, optional_vector(op, "gain", gain, K), eps};
  const ScalarType dtype = gate.scalar_type();
  Tensor x_i8 = new_tensor(shape_of(gate), ScalarType::Char);
  Tensor act_scale = new_tensor(leading, ScalarType::Float);
  auto* out = static_cast<int8_t*>(x_i8.mutable_data_ptr());
  auto* scale = static_cast<float*>(act_scale.mutable_data_ptr());
  std::atomic<bool> finite{true};
  dispatch_float(dtype, [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* gates = static_cast<const T*>(gate.const_data_ptr());
    const auto* ups = static_cast<const T*>(up.const_data_ptr());
    const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
    parallel_for(0, M, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      std::vector<T> h(static_cast<size_t>(K));
      for (int64_t m = begin; m < end; ++m) {
        const T* g = gates + m * gate_stride;
        const T* u = ups + m * up_stride;
        relu2 ? glu_row<Relu2>(g, u, K, h.data()) : glu_row<Silu>(g, u, K, h.data());
        if (!quantize_row(h.data(), dtype, norm, K, out + m * K, scale + m)) finite = false;
      }
    });
  });
  if (!finite) fail_not_finite(op, "act(gate) * up", norm, K);
  return {x_i8, act_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize));
}

}  // namespace bitnet_ext::cpu
