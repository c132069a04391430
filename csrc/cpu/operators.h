// What the operator files share: tensors in and out, and the operators that bit_linear is made of. `op` is
// the name that errors are reported under.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "packing.h"

namespace bitnet_ext::cpu {

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// An uninitialised contiguous CPU tensor. The shim is called directly: torch::stable::empty goes through the
// boxed dispatcher, which costs more than the kernels of a single token.
Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

// Pieces of `item_bytes` that a thread should at least get: below 64 kB waking it costs more than it saves.
inline int64_t grain_for(int64_t item_bytes) {
  constexpr int64_t kTaskBytes = 64 * 1024;
  return std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, item_bytes));
}

// How many fp64 sums of |w| a weight of `count` elements has.
constexpr int64_t abs_sums_of(int64_t count) {
  return (count + kSumBlock - 1) / kSumBlock;
}

// A floating-point CPU tensor that the kernels can read in place.
inline void check_input(const char* op, const char* arg, const Tensor& t) {
  check_cpu(op, arg, t);
  check_float(op, arg, t);
  check_contiguous(op, arg, t);
}

inline void check_input(const char* op, const char* arg, const Tensor& t, ScalarType dtype) {
  check_cpu(op, arg, t);
  check_dtype(op, arg, t, dtype);
  check_contiguous(op, arg, t);
}

// The data of an optional fp32 vector of `size` elements, or null.
inline const float* optional_vector(const char* op,
                                    const char* arg,
                                    const std::optional<Tensor>& t,
                                    int64_t size) {
  if (!t) return nullptr;
  check_input(op, arg, *t, ScalarType::Float);
  check_vector(op, arg, *t, size);
  return static_cast<const float*>(t->const_data_ptr());
}

// A norm without epsilon has no value for a row whose mean square is 0: its rstd is Inf, as that of no
// other row.
[[noreturn]] inline void fail_zero_row(const char* op, const char* gain_arg) {
  const std::string gain = gain_arg;
  const std::string eps = gain == "gain" ? "eps" : gain == "norm_weight" ? "norm_eps" : "first_norm_eps";
  fail(op, eps, " must be > 0 for a row of zeros (or of values whose squares are 0); got 0, or close to it");
}

// (x_i8, act_scale)
std::tuple<Tensor, Tensor> quantize_act(const char* op, const Tensor& x);
// (x_i8, act_scale, rstd)
std::tuple<Tensor, Tensor, Tensor> normalize_and_quantize(
    const char* op, const Tensor& x, const char* gain_arg, const std::optional<Tensor>& gain, double eps);
// (y, sum, rstd) of the norm of x or x + delta; sum is an empty [0] tensor without delta
std::tuple<Tensor, Tensor, Tensor> normalize_rows(const char* op,
                                                  const Tensor& x,
                                                  const std::optional<Tensor>& delta,
                                                  const char* gain_arg,
                                                  const std::optional<Tensor>& gain,
                                                  double eps);
// (packed, weight_scale)
std::tuple<Tensor, Tensor> quantize_and_pack(const char* op, const Tensor& weight);
Tensor scaled_product(const char* op,
                      const Tensor& x_i8,
                      const Tensor& act_scale,
                      const Tensor& packed,
                      const Tensor& weight_scale,
                      const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& segments,
                      ScalarType out_dtype);

}  // namespace bitnet_ext::cpu
