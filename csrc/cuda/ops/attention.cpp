// Causal attention with rotary embedding: short sequences in one kernel, and the rotation before and after an
// attention kernel of PyTorch's.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/launch_context.h"
#include "cuda/rotary.h"
#include "cuda/short_attention.h"

namespace bitnet_ext::cuda {
namespace {

struct Heads {
  int64_t B, T, num_heads, num_kv_heads, head_dim;
};

Heads check_qkv(const char* op, const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads) {
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0 || num_heads > INT16_MAX) {
    fail(op,
         "num_heads must be a multiple of num_kv_heads >= 1, and at most 32767; got ",
         num_heads,
         " and ",
         num_kv_heads);
  }
  check_dim(op, "qkv", qkv, 3);
  const int64_t stacked = num_heads + 2 * num_kv_heads, width = qkv.size(2);
  if (width < 1 || width % (2 * stacked) != 0) {
    fail(op,
         "qkv must have shape [B, T, (num_heads + 2 num_kv_heads) D] with an even D; got ",
         shape_text(qkv),
         " for ",
         num_heads,
         " and ",
         num_kv_heads,
         " heads");
  }
  return {qkv.size(0), qkv.size(1), num_heads, num_kv_heads, width / stacked};
}

void check_shape(const char* op, const char* arg, const Tensor& t, const std::vector<int64_t>& shape) {
  if (shape_of(t) != shape) fail(op, arg, " must have shape ", shape_text(shape), "; got ", shape_text(t));
}

void check_table(const LaunchContext& context, const char* arg, const Tensor& table, const Heads& heads) {
  context.check_input(arg, table, ScalarType::Float);
  check_shape(context.op(), arg, table, {heads.T, heads.head_dim});
}

// --- short sequences ---

ShortAttentionShape check_short(const LaunchContext& context,
                                const Tensor& qkv,
                                const Tensor& cos,
                                const Tensor& sin,
                                const Heads& heads) {
  const char* op = context.op();
  if (!short_attention_fits(heads.T, heads.head_dim)) {
    fail(op,
         "qkv must have T <= 128, D of 32, 64 or 128 and T D <= 8192; got T = ",
         heads.T,
         ", D = ",
         heads.head_dim);
  }
  check_table(context, "cos", cos, heads);
  check_table(context, "sin", sin, heads);
  ShortAttentionShape shape = {};
  shape.dtype = dtype_of(qkv.scalar_type());
  shape.B = heads.B;
  shape.T = heads.T;
  shape.num_heads = static_cast<int>(heads.num_heads);
  shape.num_kv_heads = static_cast<int>(heads.num_kv_heads);
  shape.head_dim = static_cast<int>(heads.head_dim);
  shape.num_sms = context.num_sms();
  shape.dependent_launch = context.dependent_launch();
  return shape;
}

// The kernels load 16 bytes at once; only a view that begins inside another tensor can be off.
template <typename T>
const T* aligned(const char* op, const char* arg, const Tensor& t) {
  const void* data = t.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    fail(op, arg, " must begin at a multiple of 16 bytes; got a view that does not: clone it");
  }
  return static_cast<const T*>(data);
}

// (out, lse)
std::tuple<Tensor, Tensor> short_attention(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads, int64_t num_kv_heads) {
  const LaunchContext context("short_attention", qkv);
  const char* op = context.op();
  context.check_float_input("qkv", qkv);
  const Heads heads = check_qkv(op, qkv, num_heads, num_kv_heads);
  ShortAttentionArgs args = {};
  args.shape = check_short(context, qkv, cos, sin, heads);
  Tensor out = context.new_tensor({heads.B, heads.T, num_heads * heads.head_dim}, qkv.scalar_type());
  Tensor lse = context.new_tensor({heads.B, num_heads, heads.T}, ScalarType::Float);
  args.qkv = aligned<void>(op, "qkv", qkv);
  args.cos = aligned<float>(op, "cos", cos);
  args.sin = aligned<float>(op, "sin", sin);
  args.out = out.mutable_data_ptr();
  args.lse = data<float>(lse);
  context.check(launch_short_attention(args, context.stream()));
  return {out, lse};
}

Tensor short_attention_backward(const Tensor& grad_out,
                                const Tensor& qkv,
                                const Tensor& cos,
                                const Tensor& sin,
                                const Tensor& out,
                                const Tensor& lse,
                                int64_t num_heads,
                                int64_t num_kv_heads) {
  const LaunchContext context("short_attention_backward", qkv);
  const char* op = context.op();
  context.check_float_input("qkv", qkv);
  const Heads heads = check_qkv(op, qkv, num_heads, num_kv_heads);
  ShortAttentionBackwardArgs args = {};
  args.shape = check_short(context, qkv, cos, sin, heads);
  const std::vector<int64_t> out_shape = {heads.B, heads.T, num_heads * heads.head_dim};
  context.check_input("grad_out", grad_out, qkv.scalar_type());
  check_shape(op, "grad_out", grad_out, out_shape);
  context.check_input("out", out, qkv.scalar_type());
  check_shape(op, "out", out, out_shape);
  context.check_input("lse", lse, ScalarType::Float);
  check_shape(op, "lse", lse, {heads.B, num_heads, heads.T});
  Tensor grad_qkv = context.new_tensor(shape_of(qkv), qkv.scalar_type());
  args.grad_out = aligned<void>(op, "grad_out", grad_out);
  args.qkv = aligned<void>(op, "qkv", qkv);
  args.cos = aligned<float>(op, "cos", cos);
  args.sin = aligned<float>(op, "sin", sin);
  args.out = aligned<void>(op, "out", out);
  args.lse = const_data<float>(lse);
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  context.check(launch_short_attention_backward(args, context.stream()));
  return grad_qkv;
}

// --- rotation alone ---

RotaryShape check_rotary(const LaunchContext& context,
                         ScalarType dtype,
                         const Tensor& cos,
                         const Tensor& sin,
                         const Heads& heads) {
  check_table(context, "cos", cos, heads);
  check_table(context, "sin", sin, heads);
  RotaryShape shape = {};
  shape.dtype = dtype_of(dtype);
  shape.B = heads.B;
  shape.T = heads.T;
  shape.num_heads = static_cast<int>(heads.num_heads);
  shape.num_kv_heads = static_cast<int>(heads.num_kv_heads);
  shape.head_dim = static_cast<int>(heads.head_dim);
  shape.cos = const_data<float>(cos);
  shape.sin = const_data<float>(sin);
  shape.dependent_launch = context.dependent_launch();
  return shape;
}

// (query, key)
std::tuple<Tensor, Tensor> rotary_query_key(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads, int64_t num_kv_heads) {
  const LaunchContext context("rotary_query_key", qkv);
  context.check_float_input("qkv", qkv);
  const Heads heads = check_qkv(context.op(), qkv, num_heads, num_kv_heads);
  RotaryArgs args = {};
  args.shape = check_rotary(context, qkv.scalar_type(), cos, sin, heads);
  Tensor query = context.new_tensor({heads.B, heads.T, num_heads, heads.head_dim}, qkv.scalar_type());
  Tensor key = context.new_tensor({heads.B, heads.T, num_kv_heads, heads.head_dim}, qkv.scalar_type());
  args.qkv = qkv.const_data_ptr();
  args.query = query.mutable_data_ptr();
  args.key = key.mutable_data_ptr();
  context.check(launch_rotary(args, context.stream()));
  return {query, key};
}

void rotate_query_key_(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads, int64_t num_kv_heads) {
  const LaunchContext context("rotate_query_key_", qkv);
  context.check_float_input("qkv", qkv);
  const Heads heads = check_qkv(context.op(), qkv, num_heads, num_kv_heads);
  RotaryInPlaceArgs args = {};
  args.shape = check_rotary(context, qkv.scalar_type(), cos, sin, heads);
  args.qkv = qkv.mutable_data_ptr();
  context.check(launch_rotary_in_place(args, context.stream()));
}

// A gradient [B, T, heads, D] whose D is contiguous.
HeadStrides check_gradient(const LaunchContext& context,
                           const char* arg,
                           const Tensor& t,
                           ScalarType dtype,
                           const Heads& heads,
                           int64_t num_heads) {
  const char* op = context.op();
  check_cuda(op, arg, t, context.device());
  check_dtype(op, arg, t, dtype);
  check_shape(op, arg, t, {heads.B, heads.T, num_heads, heads.head_dim});
  if (t.stride(3) != 1) fail(op, arg, " must have a contiguous last dimension; got stride ", t.stride(3));
  return {t.stride(0), t.stride(1), t.stride(2)};
}

Tensor rotary_query_key_backward(const Tensor& grad_query,
                                 const Tensor& grad_key,
                                 const Tensor& grad_value,
                                 const Tensor& cos,
                                 const Tensor& sin) {
  const LaunchContext context("rotary_query_key_backward", grad_query);
  const char* op = context.op();
  check_float(op, "grad_query", grad_query);
  check_dim(op, "grad_query", grad_query, 4);
  check_dim(op, "grad_key", grad_key, 4);
  const ScalarType dtype = grad_query.scalar_type();
  const Heads heads = {
      grad_query.size(0), grad_query.size(1), grad_query.size(2), grad_key.size(2), grad_query.size(3)};
  if (heads.head_dim < 2 || heads.head_dim % 2 != 0) {
    fail(op, "grad_query must have shape [B, T, num_heads, D] with an even D; got ", shape_text(grad_query));
  }
  RotaryBackwardArgs args = {};
  args.query_strides = check_gradient(context, "grad_query", grad_query, dtype, heads, heads.num_heads);
  args.key_strides = check_gradient(context, "grad_key", grad_key, dtype, heads, heads.num_kv_heads);
  args.value_strides = check_gradient(context, "grad_value", grad_value, dtype, heads, heads.num_kv_heads);
  args.shape = check_rotary(context, dtype, cos, sin, heads);
  Tensor grad_qkv = context.new_tensor(
      {heads.B, heads.T, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim}, dtype);
  args.grad_query = grad_query.const_data_ptr();
  args.grad_key = grad_key.const_data_ptr();
  args.grad_value = grad_value.const_data_ptr();
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  context.check(launch_rotary_backward(args, context.stream()));
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("short_attention", TORCH_BOX(&short_attention));
  m.impl("short_attention_backward", TORCH_BOX(&short_attention_backward));
  m.impl("rotary_query_key", TORCH_BOX(&rotary_query_key));
  m.impl("rotate_query_key_", TORCH_BOX(&rotate_query_key_));
  m.impl("rotary_query_key_backward", TORCH_BOX(&rotary_query_key_backward));
}

}  // namespace bitnet_ext::cuda
