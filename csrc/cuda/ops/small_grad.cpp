// The gradients of a ternary layer for few tokens: checks and launch.
#include "cuda/small_grad.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {
namespace {

void check_fits_int(const char* op, const char* name, int64_t size) {
  if (size > INT32_MAX) fail(op, name, " must be below 2^31; got ", size);
}

std::tuple<Tensor, Tensor> bit_linear_grad(const Tensor& grad_y,
                                           const Tensor& x_i8,
                                           const Tensor& act_scale,
                                           const Tensor& prepacked,
                                           const Tensor& weight_scale,
                                           std::vector<int64_t> segments,
                                           bool need_input,
                                           bool need_weight,
                                           ScalarType weight_dtype) {
  const LaunchContext context("bit_linear_grad", grad_y);
  const char* op = context.op();
  context.check_float_input("grad_y", grad_y);
  check_dim(op, "grad_y", grad_y, 2);
  context.check_input("x_i8", x_i8, ScalarType::Char);
  check_dim(op, "x_i8", x_i8, 2);
  const int64_t M = grad_y.size(0), N = grad_y.size(1), K = x_i8.size(1);
  if (N < 1 || K < 1 || x_i8.size(0) != M) {
    fail(op,
         "grad_y and x_i8 must have shapes [M, N] and [M, K] with N, K >= 1; got ",
         shape_text(grad_y),
         " and ",
         shape_text(x_i8));
  }
  check_fits_int(op, "M", M);
  check_fits_int(op, "N", N);
  check_fits_int(op, "K", K);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_vector(op, "act_scale", act_scale, M);
  context.check_input("prepacked", prepacked, ScalarType::Int);
  const std::vector<int64_t> shape = {block_rows(N), block_cols(K), kLanes, kStepsPerBlock};
  if (shape_of(prepacked) != shape) {
    fail(op,
         "prepacked must have shape ",
         shape_text(shape),
         " for N = ",
         N,
         ", K = ",
         K,
         "; got ",
         shape_text(prepacked));
  }
  check_cuda(op, "weight_scale", weight_scale, context.device());
  if (segments.empty()) segments.push_back(N);
  check_weight_scale(op, weight_scale, N, segments);
  check_out_dtype(op, "weight_dtype", weight_dtype);

  SmallGradArgs args = {};
  args.num_segments = static_cast<int>(segments.size());
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    end += segments[i];
    if (end % kBlockRows != 0 && i + 1 < segments.size()) {
      fail(op, "segments must be multiples of ", kBlockRows, " but for the last; got ", shape_text(segments));
    }
    args.segment_end[i] = static_cast<int>(end);
  }
  const std::vector<int64_t> none = {0};
  Tensor grad_x = context.new_tensor(need_input ? std::vector<int64_t>{M, K} : none, grad_y.scalar_type());
  Tensor grad_weight = context.new_tensor(need_weight ? std::vector<int64_t>{N, K} : none, weight_dtype);
  args.grad_y = grad_y.const_data_ptr();
  args.grad_dtype = dtype_of(grad_y.scalar_type());
  args.x_i8 = const_data<int8_t>(x_i8);
  args.act_scale = const_data<float>(act_scale);
  args.weight = static_cast<const uint32_t*>(prepacked.const_data_ptr());
  args.weight_scale = const_data<float>(weight_scale);
  args.M = static_cast<int>(M);
  args.N = static_cast<int>(N);
  args.K = static_cast<int>(K);
  args.grad_x = need_input && M > 0 ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  args.weight_dtype = dtype_of(weight_dtype);
  args.dependent_launch = context.dependent_launch();
  args.parts = context.compute_capability() >= 90 ? small_grad_parts(M, N, K, context.num_sms()) : 1;
  context.check(launch_small_grad(args, context.stream()));
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("bit_linear_grad", TORCH_BOX(&bit_linear_grad));
}

}  // namespace bitnet_ext::cuda
