// The kernels of one instruction set, written once. The including file first gives BITNET_EXT_ISA (a
// namespace), the vectors (vec_*.h) and the integer product (dot_*.h). No torch and no standard templates: a
// template that is instantiated here with wide instructions could replace, at link time, the copy that old
// CPUs run.
#include "cpu/kernels.h"
#include "packing.h"

namespace bitnet_ext::cpu::BITNET_EXT_ISA {
namespace {

// clang-format off: in order of use
#include "cpu/generic/vector_tools.inl"
#include "cpu/generic/packing.inl"
#include "cpu/generic/quantize.inl"
#include "cpu/generic/product.inl"
#include "cpu/generic/rms_norm.inl"
#include "cpu/generic/optimizer.inl"
#include "cpu/generic/softmax.inl"
// clang-format on

// Calls f with a null pointer of the storage type, which tells a generic lambda the type.
template <typename F>
inline auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(static_cast<Bf16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::kFloat32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

template <typename T>
const T* as(const void* p, T*) {
  return static_cast<const T*>(p);
}
template <typename T>
T* as(void* p, T*) {
  return static_cast<T*>(p);
}

constexpr Kernels kTable = {
    BITNET_EXT_ISA_NAME,
    // --- activations ---
    [](const void* x, Dtype dtype, int64_t rows, int64_t K, int8_t* x_i8, float* act_scale) {
      return with_type(dtype, [&](auto* t) { return quantize_act(as(x, t), rows, K, x_i8, act_scale); });
    },
    [](const void* x,
       Dtype dtype,
       const float* gain,
       double eps,
       int64_t rows,
       int64_t K,
       int8_t* x_i8,
       float* act_scale,
       float* rstd) {
      return with_type(dtype, [&](auto* t) {
        return rms_norm_quantize(as(x, t), gain, eps, rows, K, x_i8, act_scale, rstd);
      });
    },
    [](const int8_t* x_i8, const float* act_scale, int64_t rows, int64_t K, Dtype dtype, void* y) {
      with_type(dtype, [&](auto* t) { dequantize_act(x_i8, act_scale, rows, K, as(y, t)); });
    },
    // --- weights ---
    [](const void* w, Dtype dtype, int64_t count, double* block_sums) {
      with_type(dtype, [&](auto* t) { abs_sums(as(w, t), count, block_sums); });
    },
    [](const void* w, Dtype dtype, int64_t count, float half_scale, int8_t* codes) {
      with_type(dtype, [&](auto* t) { ternary_codes(as(w, t), count, half_scale, codes); });
    },
    [](const void* w, Dtype dtype, int64_t rows, int64_t K, float half_scale, uint8_t* packed) {
      with_type(dtype, [&](auto* t) { ternary_pack(as(w, t), rows, K, half_scale, packed); });
    },
    pack,
    unpack,
    [](const uint8_t* packed,
       const float* scale,
       int64_t scale_stride,
       int64_t rows,
       int64_t K,
       Dtype dtype,
       void* w) {
      return with_type(
          dtype, [&](auto* t) { return dequantize_ternary(packed, scale, scale_stride, rows, K, as(w, t)); });
    },
    // --- the integer product ---
    make_planes,
    dot,
    [](const int32_t* acc,
       float act_scale,
       const float* weight_scale,
       const float* bias,
       int64_t count,
       Dtype dtype,
       void* y) {
      with_type(dtype, [&](auto* t) { scale_row(acc, act_scale, weight_scale, bias, count, as(y, t)); });
    },
    // --- RMSNorm ---
    [](const void* x,
       Dtype dtype,
       const float* gain,
       double eps,
       int64_t rows,
       int64_t K,
       void* y,
       float* rstd) {
      with_type(dtype, [&](auto* t) { rms_norm(as(x, t), gain, eps, rows, K, as(y, t), rstd); });
    },
    // --- RMSNorm backward ---
    [](const void* grad_y,
       Dtype grad_dtype,
       const void* x,
       Dtype dtype,
       const float* gain,
       const float* rstd,
       int64_t rows,
       int64_t K,
       void* grad_x,
       float* grad_gain) {
      with_type(grad_dtype, [&](auto* g) {
        with_type(dtype, [&](auto* t) {
          rms_norm_backward(as(grad_y, g), as(x, t), gain, rstd, rows, K, as(grad_x, t), grad_gain);
        });
      });
    },
    add_to,
    // --- optimiser ---
    [](const void* x, Dtype dtype, int64_t count) {
      return with_type(dtype, [&](auto* t) { return sum_of_squares(as(x, t), count); });
    },
    adam,
    // --- loss ---
    [](const void* logits,
       Dtype dtype,
       const int64_t* target,
       int64_t rows,
       int64_t V,
       const SoftmaxStats& out) {
      with_type(dtype, [&](auto* t) { softmax_stats(as(logits, t), target, rows, V, out); });
    },
    cross_entropy_rows,
    probability_sums,
    predicted_rows,
};

}  // namespace
}  // namespace bitnet_ext::cpu::BITNET_EXT_ISA
