// The sum with a residual, its RMS norm and int8 activations in one pass. A row is computed into memory that
// stays in the cache and quantised from there, so that the operator gives what the separate ones give.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/fused_rows.h"
#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

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
  std::atomic<bool> finite{true}, zero_row{false};
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
        float rstd = 0.0f;
        if (!quantize_row(sums + m * K, dtype, norm, K, out + m * K, scale + m, &rstd)) {
          finite = false;
          if (std::isinf(rstd)) zero_row = true;
        }
      }
    });
  });
  if (!finite) fail_not_finite(op, "gain", "x + residual", norm, K, zero_row);
  return {x_i8, act_scale, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
}

}  // namespace bitnet_ext::cpu
