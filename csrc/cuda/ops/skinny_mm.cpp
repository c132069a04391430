// fp32 products of few tokens with a tall matrix: checks and launches.
#include "cuda/skinny_mm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda/launch_context.h"
#include "row_stride.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int64_t kRowMultiple = 64;  // of the rows of logits: 256 bytes

void check_matrix_input(const LaunchContext& context, const char* arg, const Tensor& t) {
  context.check_input(arg, t, ScalarType::Float);
  check_dim(context.op(), arg, t, 2);
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) {
    fail(context.op(), arg, " must start at a multiple of 16 bytes; got another address");
  }
}

// grad [T, V], whose rows may lie apart.
int64_t check_grad(const LaunchContext& context, const Tensor& grad) {
  const char* op = context.op();
  check_cuda(op, "grad", grad, context.device());
  check_dtype(op, "grad", grad, ScalarType::Float);
  check_dim(op, "grad", grad, 2);
  const int64_t stride = check_row_stride(op, "grad", grad);
  if ((grad.size(0) > 1 && stride % 4 != 0) || reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 16 != 0) {
    fail(op, "grad must have rows that start at multiples of 16 bytes; got a row stride of ", stride);
  }
  return stride;
}

void check_sizes(const LaunchContext& context, const char* arg, const Tensor& t, int64_t T, int64_t V) {
  const int64_t H = t.size(1);
  if (H < 8 || H % 8 != 0 || H > kSkinnyMaxHidden) {
    fail(context.op(), arg, " must have a multiple of 8 columns, at most ", kSkinnyMaxHidden, "; got ", H);
  }
  if (V < 1 || T * H > INT32_MAX || V > INT32_MAX - kRowMultiple) {
    fail(context.op(), "the [T, V] matrix must have 1 to 2^31 - 65 columns and T H below 2^31; got V = ", V);
  }
}

SkinnyArgs make_args(const LaunchContext& context, int64_t T, int64_t H, int64_t V) {
  SkinnyArgs args = {};
  args.T = static_cast<int>(T);
  args.H = static_cast<int>(H);
  args.V = static_cast<int>(V);
  args.dependent_launch = context.dependent_launch();
  return args;
}

Tensor skinny_mm_nt(const Tensor& hidden, const Tensor& weight) {
  const LaunchContext context("skinny_mm_nt", hidden);
  check_matrix_input(context, "hidden", hidden);
  check_matrix_input(context, "weight", weight);
  const int64_t T = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  check_sizes(context, "hidden", hidden, T, V);
  if (weight.size(1) != H) {
    fail(context.op(), "weight must have shape [V, ", H, "]; got ", shape_text(weight));
  }
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = (V + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  Tensor out = context.new_tensor({T, args.stride}, ScalarType::Float);
  args.hidden = const_data<float>(hidden);
  args.weight = const_data<float>(weight);
  args.out = data<float>(out);
  context.check(launch_skinny_nt(args, context.num_sms(), context.stream()));
  return out;
}

Tensor skinny_mm_nn(const Tensor& grad, const Tensor& weight) {
  const LaunchContext context("skinny_mm_nn", grad);
  const int64_t stride = check_grad(context, grad);
  check_matrix_input(context, "weight", weight);
  const int64_t T = grad.size(0), V = grad.size(1), H = weight.size(1);
  check_sizes(context, "weight", weight, T, V);
  if (weight.size(0) != V) {
    fail(context.op(), "weight must have shape [", V, ", H]; got ", shape_text(weight));
  }
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = stride;
  args.num_splits = skinny_nn_splits(args, context.num_sms());
  Tensor partials = context.new_tensor({args.num_splits, T, H}, ScalarType::Float);
  Tensor out = context.new_tensor({T, H}, ScalarType::Float);
  args.grad = const_data<float>(grad);
  args.weight = const_data<float>(weight);
  args.out = data<float>(out);
  args.partials = data<float>(partials);
  context.check(launch_skinny_nn(args, context.stream()));
  return out;
}

Tensor skinny_mm_tn(const Tensor& grad, const Tensor& hidden) {
  const LaunchContext context("skinny_mm_tn", grad);
  const int64_t stride = check_grad(context, grad);
  check_matrix_input(context, "hidden", hidden);
  const int64_t T = grad.size(0), V = grad.size(1), H = hidden.size(1);
  check_sizes(context, "hidden", hidden, T, V);
  if (hidden.size(0) != T) {
    fail(context.op(), "hidden must have shape [", T, ", H]; got ", shape_text(hidden));
  }
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = stride;
  Tensor out = context.new_tensor({V, H}, ScalarType::Float);
  args.grad = const_data<float>(grad);
  args.hidden = const_data<float>(hidden);
  args.out = data<float>(out);
  context.check(launch_skinny_tn(args, context.num_sms(), context.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("skinny_mm_nt", TORCH_BOX(&skinny_mm_nt));
  m.impl("skinny_mm_nn", TORCH_BOX(&skinny_mm_nn));
  m.impl("skinny_mm_tn", TORCH_BOX(&skinny_mm_tn));
}

}  // namespace bitnet_ext::cuda
