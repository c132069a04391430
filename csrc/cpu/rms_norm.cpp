// The RMS norm, optionally behind the sum with the output of a block, its backward, and that of two norms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/fused_rows.h"
#include "cpu/operators.h"

namespace bitnet_ext::cpu {
using torch::stable::parallel_for;

std::tuple<Tensor, Tensor, Tensor> normalize_rows(const char* op,
                                                  const Tensor& x,
                                                  const std::optional<Tensor>& delta,
                                                  const char* gain_arg,
                                                  const std::optional<Tensor>& gain,
                                                  double eps) {
  check_input(op, "x", x);
  const auto [M, K, leading] = check_rows(op, "x", x);
  if (delta) {
    check_input(op, "delta", *delta);
  }
  check_delta(op, x, delta, true);
  const float* gains = optional_vector(op, gain_arg, gain, K);
  const ScalarType dtype = x.scalar_type();
  Tensor y = new_tensor(shape_of(x), dtype);
  Tensor sum = new_tensor(delta ? shape_of(x) : std::vector<int64_t>{0}, dtype);
  Tensor rstd = new_tensor(leading, ScalarType::Float);
  auto* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  const Kernels& table = kernels();
  dispatch_float(dtype, [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* in = static_cast<const T*>(x.const_data_ptr());
    auto* out = static_cast<T*>(y.mutable_data_ptr());
    auto* sums = static_cast<T*>(sum.mutable_data_ptr());
    dispatch_float(delta ? delta->scalar_type() : dtype, [&](auto delta_zero) {
      using D = decltype(delta_zero);
      const auto* added = delta ? static_cast<const D*>(delta->const_data_ptr()) : nullptr;
      const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
      parallel_for(0, M, grain_for(4 * row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          const T* row = in + m * K;
          if (added) {
            for (int64_t i = m * K; i < (m + 1) * K; ++i) {
              sums[i] = from_float<T>(to_float(in[i]) + to_float(added[i]));
            }
            row = sums + m * K;
          }
          table.rms_norm(row, dtype_of(dtype), gains, eps, 1, K, out + m * K, rstds + m);
        }
      });
    });
  });
  if (std::any_of(rstds, rstds + M, [](float r) { return std::isinf(r); })) fail_zero_row(op, gain_arg);
  return {y, sum, rstd};
}

namespace {

// (y, sum, rstd); sum is an empty [0] tensor without delta.
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x,
                                            const std::optional<Tensor>& delta,
                                            const std::optional<Tensor>& gain,
                                            double eps) {
  return normalize_rows("rms_norm", x, delta, "gain", gain, eps);
}

// (grad_x, grad_delta, grad_gain); grad_delta is grad_x in `delta_dtype`, an empty [0] tensor where that is
// x's.
std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                                     const Tensor& x,
                                                     const std::optional<Tensor>& gain,
                                                     const Tensor& rstd,
                                                     const std::optional<Tensor>& grad_residual,
                                                     ScalarType delta_dtype) {
  const char* op = "rms_norm_backward";
  check_input(op, "grad_y", grad_y);
  check_input(op, "x", x);
  check_same_shape(op, "grad_y", grad_y, "x", x);
  check_input(op, "rstd", rstd, ScalarType::Float);
  const auto [M, K, leading] = check_rows(op, "x", x);
  check_numel(op, "rstd", rstd, M);
  const ScalarType dtype = x.scalar_type();
  if (grad_residual) {
    check_input(op, "grad_residual", *grad_residual, dtype);
    check_same_shape(op, "grad_residual", *grad_residual, "x", x);
  }
  check_out_dtype(op, "delta_dtype", delta_dtype);
  const float* gains = optional_vector(op, "gain", gain, K);
  const bool wants_delta = delta_dtype != dtype;

  const Kernels& table = kernels();
  Tensor grad_x = new_tensor(shape_of(x), dtype);
  Tensor grad_delta = new_tensor(wants_delta ? shape_of(x) : std::vector<int64_t>{0}, delta_dtype);
  Tensor grad_gain = new_tensor({gains ? K : 0}, ScalarType::Float);
  const auto* dy = static_cast<const char*>(grad_y.const_data_ptr());
  const auto* rstds = static_cast<const float*>(rstd.const_data_ptr());
  const Dtype dy_dtype = dtype_of(grad_y.scalar_type());
  const int64_t dy_row = K * static_cast<int64_t>(grad_y.element_size());
  auto* gain_sum = gains ? static_cast<float*>(grad_gain.mutable_data_ptr()) : nullptr;
  dispatch_float(dtype, [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* in = static_cast<const T*>(x.const_data_ptr());
    const auto* residual = grad_residual ? static_cast<const T*>(grad_residual->const_data_ptr()) : nullptr;
    auto* out = static_cast<T*>(grad_x.mutable_data_ptr());
    const auto plain = [&](int64_t first, int64_t rows, float* partial) {
      table.rms_norm_backward(dy + first * dy_row,
                              dy_dtype,
                              in + first * K,
                              dtype_of(dtype),
                              gains,
                              rstds + first,
                              rows,
                              K,
                              out + first * K,
                              partial);
    };
    // Row by row in fp32, so that the sum is rounded once.
    const auto with_sum = [&](int64_t first, int64_t rows, float* partial) {
      std::vector<float> row(static_cast<size_t>(K)), grad(static_cast<size_t>(K));
      for (int64_t m = first; m < first + rows; ++m) {
        for (int64_t k = 0; k < K; ++k) row[static_cast<size_t>(k)] = to_float(in[m * K + k]);
        table.rms_norm_backward(dy + m * dy_row,
                                dy_dtype,
                                row.data(),
                                Dtype::kFloat32,
                                gains,
                                rstds + m,
                                1,
                                K,
                                grad.data(),
                                partial);
        if (residual) {
          for (int64_t k = 0; k < K; ++k) grad[static_cast<size_t>(k)] += to_float(residual[m * K + k]);
        }
        for (int64_t k = 0; k < K; ++k) out[m * K + k] = from_float<T>(grad[static_cast<size_t>(k)]);
        if (!wants_delta) continue;
        dispatch_float(delta_dtype, [&](auto delta_zero) {
          using D = decltype(delta_zero);
          auto* copy = static_cast<D*>(grad_delta.mutable_data_ptr()) + m * K;
          for (int64_t k = 0; k < K; ++k) copy[k] = from_float<D>(grad[static_cast<size_t>(k)]);
        });
      }
    };
    const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
    if (residual || wants_delta) {
      for_row_blocks(M, K, 2 * row_bytes, gain_sum, with_sum);
    } else {
      for_row_blocks(M, K, row_bytes, gain_sum, plain);
    }
  });
  return {grad_x, grad_delta, grad_gain};
}

// y of the forward again, by its arithmetic.
Tensor normed_again(const char* op, const Tensor& x, const Tensor& gain, const Tensor& rstd) {
  check_input(op, "x", x);
  check_input(op, "first_rstd", rstd, ScalarType::Float);
  const auto [M, K, leading] = check_rows(op, "x", x);
  check_numel(op, "first_rstd", rstd, M);
  const float* gains = optional_vector(op, "first_gain", gain, K);
  const auto* rstds = static_cast<const float*>(rstd.const_data_ptr());
  Tensor y = new_tensor(shape_of(x), x.scalar_type());
  dispatch_float(x.scalar_type(), [&, M = M, K = K](auto zero) {
    using T = decltype(zero);
    const auto* in = static_cast<const T*>(x.const_data_ptr());
    auto* out = static_cast<T*>(y.mutable_data_ptr());
    parallel_for(0, M, grain_for(2 * K * static_cast<int64_t>(sizeof(T))), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t k = 0; k < K; ++k) {
          out[m * K + k] = from_float<T>(to_float(in[m * K + k]) * rstds[m] * gains[k]);
        }
      }
    });
  });
  return y;
}

// (grad_x, grad_delta, grad_first_gain, grad_gain); grad_delta as of rms_norm_backward.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pair_backward(const Tensor& grad_z,
                                                              const Tensor& x,
                                                              const Tensor& first_gain,
                                                              const Tensor& first_rstd,
                                                              const Tensor& gain,
                                                              const Tensor& rstd,
                                                              const std::optional<Tensor>& grad_residual,
                                                              ScalarType delta_dtype) {
  const Tensor y = normed_again("norm_pair_backward", x, first_gain, first_rstd);
  auto [grad_y, no_delta, grad_gain] =
      rms_norm_backward(grad_z, y, gain, rstd, std::nullopt, x.scalar_type());
  auto [grad_x, grad_delta, grad_first_gain] =
      rms_norm_backward(grad_y, x, first_gain, first_rstd, grad_residual, delta_dtype);
  return {grad_x, grad_delta, grad_first_gain, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("norm_pair_backward", TORCH_BOX(&norm_pair_backward));
}

}  // namespace bitnet_ext::cpu
