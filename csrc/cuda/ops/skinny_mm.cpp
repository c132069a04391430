// fp32 products of few tokens with a tall matrix: checks and launches.
#include "cuda/skinny_mm.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "cuda/launch_context.h"
#include "cuda/sm90_gemm.h"
#include "row_stride.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int64_t kColumnMultiple = 32;  // of the logits: whole tiles

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
  if (V < 1 || T * H > INT32_MAX || V > INT32_MAX - 64) {
    fail(context.op(), "the [T, V] matrix must have 1 to 2^31 - 65 columns and T H below 2^31; got V = ", V);
  }
}

void check_shape(const LaunchContext& context, const char* arg, const Tensor& t, int64_t rows, int64_t cols) {
  if (t.size(0) != rows || t.size(1) != cols) {
    fail(context.op(), arg, " must have shape ", shape_text({rows, cols}), "; got ", shape_text(t));
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

// Whether the kernels with wgmma run: this device has it, and this build. BITNET_EXT_WGMMA=0, read at each
// call, chooses those for sm_80 all the same: to compare the two, and to test those.
bool has_wgmma(const LaunchContext& context) {
  const char* setting = std::getenv("BITNET_EXT_WGMMA");
  const bool off = setting != nullptr && setting[0] == '0' && setting[1] == '\0';
  return !off && context.compute_capability() == 90 && sm90_is_compiled();
}

void skinny_mm_nt_(const Tensor& out, const Tensor& hidden, const Tensor& weight) {
  const LaunchContext context("skinny_mm_nt_", out);
  const char* op = context.op();
  check_matrix_input(context, "out", out);
  check_matrix_input(context, "hidden", hidden);
  check_matrix_input(context, "weight", weight);
  const int64_t T = hidden.size(0), H = hidden.size(1), V = weight.size(0), S = out.size(1);
  check_sizes(context, "hidden", hidden, T, V);
  if (weight.size(1) != H) fail(op, "weight must have shape [V, ", H, "]; got ", shape_text(weight));
  if (out.size(0) != T || S < V || S % kColumnMultiple != 0) {
    fail(op,
         "out must have shape [",
         T,
         ", S] with S >= V = ",
         V,
         ", a multiple of ",
         kColumnMultiple,
         "; got ",
         shape_text(out));
  }
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = S;
  args.hidden = const_data<float>(hidden);
  args.weight = const_data<float>(weight);
  args.out = data<float>(out);
  const auto launch = has_wgmma(context) ? launch_sm90_skinny_nt : launch_skinny_nt;
  context.check(launch(args, context.num_sms(), context.stream()));
}

void skinny_mm_nn_(const Tensor& out, const Tensor& grad, const Tensor& weight) {
  const LaunchContext context("skinny_mm_nn_", out);
  check_matrix_input(context, "out", out);
  const int64_t stride = check_grad(context, grad);
  check_matrix_input(context, "weight", weight);
  const int64_t T = grad.size(0), V = grad.size(1), H = weight.size(1);
  check_sizes(context, "weight", weight, T, V);
  check_shape(context, "out", out, T, H);
  check_shape(context, "weight", weight, V, H);
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = stride;
  const bool wgmma = has_wgmma(context);
  args.num_splits = skinny_nn_splits(args, wgmma ? kSm90SkinnyNnChunk : kSkinnyNnChunk, context.num_sms());
  Tensor partials = context.new_tensor({args.num_splits, T, H}, ScalarType::Float);
  args.grad = const_data<float>(grad);
  args.weight = const_data<float>(weight);
  args.out = data<float>(out);
  args.partials = data<float>(partials);
  context.check((wgmma ? launch_sm90_skinny_nn : launch_skinny_nn)(args, context.stream()));
}

void skinny_mm_tn_(
    const Tensor& out, const Tensor& grad, const Tensor& hidden, bool accumulate, int64_t max_blocks) {
  const LaunchContext context("skinny_mm_tn_", out);
  if (max_blocks < 0) fail(context.op(), "max_blocks must be >= 0; got ", max_blocks);
  check_matrix_input(context, "out", out);
  const int64_t stride = check_grad(context, grad);
  check_matrix_input(context, "hidden", hidden);
  const int64_t T = grad.size(0), V = grad.size(1), H = hidden.size(1);
  check_sizes(context, "hidden", hidden, T, V);
  check_shape(context, "out", out, V, H);
  check_shape(context, "hidden", hidden, T, H);
  SkinnyArgs args = make_args(context, T, H, V);
  args.stride = stride;
  args.accumulate = accumulate;
  args.grad = const_data<float>(grad);
  args.hidden = const_data<float>(hidden);
  args.out = data<float>(out);
  const int num_sms = context.num_sms();
  const int blocks = max_blocks == 0 || max_blocks > num_sms ? num_sms : static_cast<int>(max_blocks);
  context.check(
      (has_wgmma(context) ? launch_sm90_skinny_tn : launch_skinny_tn)(args, blocks, context.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("skinny_mm_nt_", TORCH_BOX(&skinny_mm_nt_));
  m.impl("skinny_mm_nn_", TORCH_BOX(&skinny_mm_nn_));
  m.impl("skinny_mm_tn_", TORCH_BOX(&skinny_mm_tn_));
}

}  // namespace bitnet_ext::cuda
