// Argument checks shared by the CPU and CUDA operators.
//
// A failed check throws std::runtime_error with one sentence that names the operator, the argument, what was
// given and what is accepted. STD_TORCH_CHECK is avoided because it puts the function, file and line before
// the text. Checks must run outside torch::stable::parallel_for, which would replace the text.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "pending_steps.h"

namespace bitnet_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of a message as text. std::ostringstream is avoided: where torch has brought a second libstdc++ into
// the process, writing a number to one crashes (seen with torch 2.11 and a statically linked gcc 13).
inline std::string text_of(const char* part) {
  return part;
}
inline std::string text_of(const std::string& part) {
  return part;
}
template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string text_of(Number part) {
  return std::to_string(part);
}

// Throws "bitnet_ext.<op>: <parts...>".
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::string text = std::string("bitnet_ext.") + op + ": ";
  ((text += text_of(parts)), ...);
  throw std::runtime_error(text);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline std::string shape_text(const Tensor& t) {
  return shape_text(shape_of(t));
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// `out_dtype` and `dtype` arguments: what an operator can write.
inline void check_out_dtype(const char* op, const char* arg, ScalarType dtype) {
  if (!is_float_dtype(dtype)) {
    fail(op, arg, " must be float32, bfloat16 or float16; got ", dtype_name(dtype));
  }
}

inline void check_dtype(const char* op, const char* arg, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype) {
    fail(op, arg, " must be ", dtype_name(dtype), "; got ", dtype_name(t.scalar_type()));
  }
}

inline void check_float(const char* op, const char* arg, const Tensor& t) {
  if (!is_float_dtype(t.scalar_type())) {
    fail(op, arg, " must be float32, bfloat16 or float16; got ", dtype_name(t.scalar_type()));
  }
}

inline void check_contiguous(const char* op, const char* arg, const Tensor& t) {
  if (!t.is_contiguous()) fail(op, arg, " must be contiguous; got a strided view of shape ", shape_text(t));
}

inline void check_cpu(const char* op, const char* arg, const Tensor& t) {
  if (!t.is_cpu()) fail(op, arg, " must be on the CPU like the other arguments; got another device");
}

// The dispatcher picks CUDA as soon as one argument is there, so every other argument has to be checked.
inline void check_cuda(const char* op, const char* arg, const Tensor& t, int32_t device_index) {
  if (!t.is_cuda())
    fail(op, arg, " must be on cuda:", device_index, " like the other arguments; got another device");
  if (t.get_device_index() != device_index) {
    fail(op,
         arg,
         " must be on cuda:",
         device_index,
         " like the other arguments; got cuda:",
         t.get_device_index());
  }
}

inline void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim) {
  if (t.dim() != dim) fail(op, arg, " must have ", dim, " dimension(s); got shape ", shape_text(t));
}

// A vector of exactly `size` elements.
inline void check_vector(const char* op, const char* arg, const Tensor& t, int64_t size) {
  if (t.dim() != 1 || t.numel() != size) {
    fail(op, arg, " must have shape [", size, "]; got ", shape_text(t));
  }
}

inline void check_numel(const char* op, const char* arg, const Tensor& t, int64_t numel) {
  if (t.numel() != numel) {
    fail(op, arg, " must have ", numel, " element(s); got ", t.numel(), " in shape ", shape_text(t));
  }
}

inline void check_same_shape(
    const char* op, const char* arg, const Tensor& t, const char* like_arg, const Tensor& like) {
  if (shape_of(t) != shape_of(like)) {
    fail(op, arg, " must have the shape of ", like_arg, ", ", shape_text(like), "; got ", shape_text(t));
  }
}

// A [.., K] tensor seen as M rows of K.
struct Rows {
  int64_t M;
  int64_t K;
  std::vector<int64_t> leading;  // the shape without its last dimension
};

inline Rows check_rows(const char* op, const char* arg, const Tensor& t) {
  if (t.dim() < 1 || t.size(-1) < 1) {
    fail(op, arg, " must have shape [.., K] with K >= 1; got ", shape_text(t));
  }
  Rows rows;
  rows.leading = shape_of(t);
  rows.K = rows.leading.back();
  rows.leading.pop_back();
  rows.M = t.numel() / rows.K;
  return rows;
}

// A [N, K] weight.
inline void check_matrix(const char* op, const char* arg, const Tensor& t) {
  if (t.dim() != 2 || t.size(0) < 1 || t.size(1) < 1) {
    fail(op, arg, " must have shape [N, K] with N, K >= 1; got ", shape_text(t));
  }
}

// The rows of each of the matrices [N_i, K] that one product reads as a stack, for activations of K features.
inline std::vector<int64_t> check_stack(const char* op, const std::vector<Tensor>& weights, int64_t K) {
  if (weights.empty()) fail(op, "weights must hold at least one tensor; got an empty list");
  std::vector<int64_t> rows;
  for (const Tensor& weight : weights) {
    check_matrix(op, "weights", weight);
    if (weight.size(1) != K) {
      fail(op, "x must have K = ", weight.size(1), " like weights ", shape_text(weight), "; got K = ", K);
    }
    rows.push_back(weight.size(0));
  }
  return rows;
}

// What is added to x in front of a norm: of x's type, or narrower.
inline void check_delta(const char* op, const Tensor& x, const std::optional<Tensor>& delta, bool normalize) {
  if (!delta.has_value()) return;
  if (!normalize) fail(op, "delta must be absent when normalize is false; got a tensor");
  check_same_shape(op, "delta", *delta, "x", x);
  if (delta->scalar_type() != x.scalar_type() &&
      !(x.scalar_type() == ScalarType::Float && is_float_dtype(delta->scalar_type()))) {
    fail(op,
         "delta must be of the dtype of x, or x of float32; got ",
         dtype_name(delta->scalar_type()),
         " and ",
         dtype_name(x.scalar_type()));
  }
}

// The norm in front of another one.
inline void check_first_norm(const char* op,
                             const std::optional<Tensor>& first_norm_weight,
                             const std::optional<Tensor>& norm_weight) {
  if (first_norm_weight.has_value() && !norm_weight.has_value()) {
    fail(op, "first_norm_weight needs norm_weight; got None");
  }
}

inline void check_backward(const char* op, const std::string& backward) {
  if (backward != "exact" && backward != "int8") {
    fail(op, "backward must be exact or int8; got '", backward, "'");
  }
}

// The packed form of a [N, K] weight: uint8 [N, ceil(K / 4)].
inline void check_packed(const char* op, const Tensor& packed, int64_t K) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_contiguous(op, "packed", packed);
  if (K < 1) fail(op, "K must be >= 1; got ", K);
  const int64_t bytes = (K + 3) / 4;
  if (packed.dim() != 2 || packed.size(0) < 1 || packed.size(1) != bytes) {
    fail(op, "packed must have shape [N, ", bytes, "] for K = ", K, "; got ", shape_text(packed));
  }
}

// A list that belongs to params.
inline void check_length(const char* op, const char* arg, size_t length, size_t params) {
  if (length != params) {
    fail(op, arg, " must have one entry for each of params, ", params, "; got ", length);
  }
}

// abs_sums float64 of exactly as many values as the ternary params have partial sums.
inline void check_abs_sums(const char* op, const std::optional<Tensor>& abs_sums, int64_t num_sums) {
  if (abs_sums.has_value()) {
    check_vector(op, "abs_sums", *abs_sums, num_sums);
  } else if (num_sums > 0) {
    fail(op, "abs_sums must be given with ternary params; got none");
  }
}

// Partial sums of squares that clip_gradients_ need not make, and whose they are.
inline void check_known(const char* op,
                        const std::vector<Tensor>& grads,
                        const std::optional<Tensor>& known,
                        int64_t known_index) {
  const int64_t count = static_cast<int64_t>(grads.size());
  if (known.has_value() ? known_index < 0 || known_index >= count : known_index != -1) {
    fail(op,
         "known_index must be the index of one of ",
         count,
         " grads, or -1 without known; got ",
         known_index);
  }
}

// ids [T] or [S, T] of an embedding of V rows.
struct RowIds {
  int64_t S, T;
  std::vector<int64_t> slots_shape;
};

inline RowIds check_row_ids(const char* op, const Tensor& ids, int64_t V) {
  if (ids.dim() != 1 && ids.dim() != 2) fail(op, "ids must have shape [T] or [S, T]; got ", shape_text(ids));
  if (V < 1) fail(op, "V must be >= 1; got ", V);
  const int64_t S = ids.dim() == 1 ? 1 : ids.size(0), T = ids.size(-1);
  if (T > INT32_MAX) fail(op, "ids must be fewer than 2^31; got ", T);
  return {S, T, ids.dim() == 1 ? std::vector<int64_t>{V} : std::vector<int64_t>{S, V}};
}

// Gradients rows [T, H] of the embeddings of ids [T], and slots [V].
inline void check_rows_of_ids(const char* op, const Tensor& ids, const Tensor& rows, const Tensor& slots) {
  check_dim(op, "ids", ids, 1);
  if (rows.dim() != 2 || rows.size(0) != ids.size(0) || rows.size(1) < 1) {
    fail(op, "rows must have shape [T, H] for ids of shape ", shape_text(ids), "; got ", shape_text(rows));
  }
  check_dim(op, "slots", slots, 1);
}

// The one parameter of adam_step_ whose gradient comes as rows, or none (row_param -1, no slots).
inline void check_row_param(const char* op,
                            const std::vector<Tensor>& params,
                            const std::vector<Tensor>& grads,
                            const std::optional<Tensor>& slots,
                            int64_t row_param) {
  if (!slots.has_value()) {
    if (row_param != -1) fail(op, "row_param must be -1 without slots; got ", row_param);
    return;
  }
  if (row_param < 0 || row_param >= static_cast<int64_t>(params.size())) {
    fail(op, "row_param must be the index of one of ", params.size(), " params; got ", row_param);
  }
  const Tensor& param = params[static_cast<size_t>(row_param)];
  const Tensor& grad = grads[static_cast<size_t>(row_param)];
  if (param.dim() != 2 || param.numel() > UINT32_MAX) {
    fail(op,
         "the param of row_param must have shape [V, H] and fewer than 2^32 elements; got ",
         shape_text(param));
  }
  if (grad.dim() != 2 || grad.size(1) != param.size(1)) {
    fail(op, "the grad of row_param must have shape [T, ", param.size(1), "]; got ", shape_text(grad));
  }
  check_vector(op, "slots", *slots, param.size(0));
}

inline void check_num_blocks(const char* op, int64_t num_blocks) {
  if (num_blocks < 0 || num_blocks > INT32_MAX) fail(op, "num_blocks must be >= 0; got ", num_blocks);
}

// An update beside other work: no sums of magnitudes, no gradient by rows.
inline void check_beside(const char* op,
                         const std::optional<Tensor>& slots,
                         int64_t num_blocks,
                         int64_t num_sums) {
  check_num_blocks(op, num_blocks);
  if (num_blocks > 0 && num_sums > 0) fail(op, "num_blocks must be 0 with ternary params; got ", num_blocks);
  if (num_blocks > 0 && slots.has_value()) fail(op, "num_blocks must be 0 with slots; got ", num_blocks);
}

// The pending steps of adam_rows_; ids [T] are those of the step behind them.
inline void check_pending_steps(const char* op,
                                const Tensor& param,
                                const std::vector<Tensor>& grads,
                                const Tensor& slots,
                                const Tensor& hyper,
                                const std::vector<Tensor>& grad_scales,
                                const std::optional<Tensor>& ids) {
  if (param.dim() != 2 || param.numel() > UINT32_MAX || param.size(1) > INT32_MAX) {
    fail(op, "param must have shape [V, H] and fewer than 2^32 elements; got ", shape_text(param));
  }
  const int64_t V = param.size(0), H = param.size(1), steps = static_cast<int64_t>(grads.size());
  if (steps < 1 || steps > kMaxPendingSteps) {
    fail(op, "grads must be those of 1 to ", kMaxPendingSteps, " steps; got ", steps);
  }
  for (const Tensor& grad : grads) {
    if (grad.dim() != 2 || grad.size(1) != H) {
      fail(op, "each of grads must have shape [T, ", H, "]; got ", shape_text(grad));
    }
  }
  const int64_t rows = steps + (ids.has_value() ? 1 : 0);
  if (slots.dim() != 2 || slots.size(0) < rows || slots.size(1) != V) {
    fail(op, "slots must have shape [S, ", V, "] with S >= ", rows, "; got ", shape_text(slots));
  }
  if (hyper.dim() != 2 || hyper.size(0) < steps || hyper.size(1) < 4) {
    fail(op, "hyper must have shape [S, 4 or more] with S >= ", steps, "; got ", shape_text(hyper));
  }
  if (grad_scales.size() != grads.size()) {
    fail(op, "grad_scales must be one for each of ", steps, " grads; got ", grad_scales.size());
  }
  for (const Tensor& grad_scale : grad_scales) check_numel(op, "each of grad_scales", grad_scale, 1);
  if (!ids.has_value()) return;
  check_dim(op, "ids", *ids, 1);
  if (ids->numel() > INT32_MAX) fail(op, "ids must be fewer than 2^31; got ", ids->numel());
}

// The lists of quantize_weight_groups_: group g is the next group_sizes[g] weights.
inline void check_groups(const char* op,
                         const std::vector<Tensor>& weights,
                         const std::vector<int64_t>& group_sizes,
                         const std::vector<Tensor>& packed,
                         const std::vector<Tensor>& weight_scale) {
  if (weights.empty()) fail(op, "weights must hold at least one tensor; got an empty list");
  const int64_t count = static_cast<int64_t>(weights.size());
  int64_t total = 0;
  for (const int64_t size : group_sizes) {
    if (size < 1 || size > count - total) {
      fail(op,
           "group_sizes must be sizes >= 1 that sum to the ",
           count,
           " weights; got ",
           shape_text(group_sizes));
    }
    total += size;
  }
  if (total != count) {
    fail(op,
         "group_sizes must be sizes >= 1 that sum to the ",
         count,
         " weights; got ",
         shape_text(group_sizes));
  }
  if (packed.size() != group_sizes.size() || weight_scale.size() != group_sizes.size()) {
    fail(op,
         "packed and weight_scale must have one tensor for each of the ",
         group_sizes.size(),
         " groups; got ",
         packed.size(),
         " and ",
         weight_scale.size());
  }
}

// weight_scale of a product: one value, one a row, or one a segment of rows (fused projections).
inline void check_weight_scale(const char* op,
                               const Tensor& weight_scale,
                               int64_t N,
                               const std::vector<int64_t>& segments) {
  constexpr size_t kMaxSegments = 16;  // CUDA kernels take the segments by value
  check_dtype(op, "weight_scale", weight_scale, ScalarType::Float);
  check_contiguous(op, "weight_scale", weight_scale);
  if (segments.empty()) {
    if (weight_scale.numel() != 1 && weight_scale.numel() != N) {
      fail(op,
           "weight_scale must have 1 or N = ",
           N,
           " element(s) when segments is empty; got ",
           weight_scale.numel());
    }
    return;
  }
  if (segments.size() > kMaxSegments) {
    fail(op, "segments must hold 1 to ", kMaxSegments, " sizes; got ", segments.size());
  }
  int64_t total = 0;
  for (const int64_t size : segments) {
    // Compared before adding, so that huge sizes cannot overflow the sum.
    if (size < 1 || size > N - total) {
      fail(op, "segments must be sizes >= 1 that sum to N = ", N, "; got ", shape_text(segments));
    }
    total += size;
  }
  if (total != N) fail(op, "segments must be sizes >= 1 that sum to N = ", N, "; got ", shape_text(segments));
  if (weight_scale.numel() != static_cast<int64_t>(segments.size())) {
    fail(op,
         "weight_scale must have one element for each of the ",
         segments.size(),
         " segments; got ",
         weight_scale.numel());
  }
}

}  // namespace bitnet_ext
