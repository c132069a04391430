// The products of int8 activations with ternary and int8 weights: checks, the choice of a kernel, launch.
#include "cuda/product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cuda/decode.h"
#include "cuda/gemv.h"
#include "cuda/heuristics.h"
#include "cuda/launch_context.h"
#include "cuda/ops/flag_slots.h"
#include "cuda/ops/parts.h"
#include "cuda/sm80_gemm.h"
#include "cuda/sm90_gemm.h"

namespace bitnet_ext::cuda {
namespace {

// --- the kernel -----------------------------------------------------------------------------------------

struct Device {
  bool sm90;            // compute capability 9.0, and this build has code for it
  size_t shared_limit;  // bytes a block may use
};

Device device_facts(const LaunchContext& context) {
  const int capability = context.compute_capability();
  return {capability == 90 && sm90_is_compiled(), shared_memory_limit(context.op(), context.device())};
}

// BITNET_EXT_KERNEL, read at each call, for tests and bug reports.
std::optional<ProductKernel> forced_kernel(const char* op) {
  const char* name = std::getenv("BITNET_EXT_KERNEL");
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) return std::nullopt;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kProductKernelNames[i]) == 0) return static_cast<ProductKernel>(i);
  }
  fail(op, "BITNET_EXT_KERNEL must be auto, gemv, decode, sm80_gemm or sm90_gemm; got ", name);
}

void check_forced(const LaunchContext& context,
                  ProductKernel kernel,
                  const ProductArgs& args,
                  const Device& device) {
  const char* op = context.op();
  if (kernel == ProductKernel::kGemv && args.M != 1) {
    fail(op, "BITNET_EXT_KERNEL=gemv computes M = 1; got M = ", args.M);
  }
  if (kernel == ProductKernel::kDecode &&
      (args.M > kDecodeMaxTokens ||
       decode_plan(args.M, args.N, args.K, args.kind, context.num_sms(), device.shared_limit).blocks == 0)) {
    fail(op,
         "BITNET_EXT_KERNEL=decode computes M <= ",
         kDecodeMaxTokens,
         " whose activations fit shared memory; got M = ",
         args.M,
         " with K = ",
         args.K);
  }
  if (kernel == ProductKernel::kSm90Gemm) {
    const int capability = context.compute_capability();
    if (capability != 90) {
      fail(op,
           "BITNET_EXT_KERNEL=sm90_gemm needs a GPU of compute capability 9.0; got ",
           capability / 10,
           ".",
           capability % 10);
    }
    if (!device.sm90) fail(op, "BITNET_EXT_KERNEL=sm90_gemm needs a build with 90a among its architectures");
    if (!sm90_can_read(args)) {
      fail(op,
           "BITNET_EXT_KERNEL=sm90_gemm needs K to be a multiple of 16 and x_i8 at such an address; got K = ",
           args.K);
    }
  }
}

void launch_product(const LaunchContext& context, ProductArgs& args) {
  if (args.M == 0) return;
  const char* op = context.op();
  const Device device = device_facts(context);
  const std::optional<ProductKernel> forced = forced_kernel(op);
  if (forced.has_value()) check_forced(context, *forced, args, device);
  const ProductKernel kernel = forced.value_or(product_kernel(args.M,
                                                              args.N,
                                                              args.K,
                                                              args.kind,
                                                              device.sm90 && sm90_can_read(args),
                                                              context.num_sms(),
                                                              device.shared_limit));
  args.dependent_launch = context.dependent_launch();
  switch (kernel) {
    case ProductKernel::kGemv:
      context.check(
          launch_gemv(args, gemv_plan(args.N, args.K, args.kind, context.num_sms()), context.stream()));
      return;
    case ProductKernel::kDecode:
      context.check(launch_decode(
          args,
          decode_plan(args.M, args.N, args.K, args.kind, context.num_sms(), device.shared_limit),
          context.stream()));
      return;
    case ProductKernel::kSm80Gemm:
      context.check(launch_sm80_gemm(
          args, sm80_gemm_tile(args.M, args.N, context.num_sms()), context.num_sms(), context.stream()));
      return;
    case ProductKernel::kSm90Gemm:
      break;
  }
  Sm90Plan plan = sm90_plan(args.M, args.N, args.K, args.kind, context.num_sms());
  std::optional<Tensor> partials;
  if (plan.split_tiles > 0) {
    args.flags = flag_slots().slot(op, context.device(), context.stream());
    if (args.flags == nullptr) {  // no slot is left for this capture: whole tiles need none
      plan.split_tiles = 0;
      plan.blocks = static_cast<uint32_t>(std::min<int64_t>(plan.blocks, sm90_tiles(args, plan)));
    } else {
      partials = context.new_tensor({sm90_partials(plan)}, ScalarType::Int);
      args.partials = data<int32_t>(*partials);
    }
  }
  context.check(launch_sm90_gemm(args, plan, context.stream()));
}

// --- operands -------------------------------------------------------------------------------------------

// Ternary weights are int32 [ceil(N / 16), ceil(K / 128), 32, 4], int8 ones [.., .., 4, 32, 4].
WeightKind check_prepacked(const LaunchContext& context, const Tensor& prepacked, int64_t N, int64_t K) {
  const char* op = context.op();
  context.check_input("prepacked", prepacked, ScalarType::Int);
  if (N < 1) fail(op, "N must be >= 1; got ", N);
  const bool ternary = prepacked.dim() == 4;
  std::vector<int64_t> shape = {block_rows(N), block_cols(K)};
  if (!ternary) shape.push_back(kStepsPerBlock);
  shape.push_back(kLanes);
  shape.push_back(4);
  if ((prepacked.dim() != 4 && prepacked.dim() != 5) || shape_of(prepacked) != shape) {
    fail(op,
         "prepacked must have shape [",
         block_rows(N),
         ", ",
         block_cols(K),
         ", 32, 4] (ternary) or [",
         block_rows(N),
         ", ",
         block_cols(K),
         ", 4, 32, 4] (int8) for N = ",
         N,
         " and K = ",
         K,
         "; got ",
         shape_text(prepacked));
  }
  if (reinterpret_cast<uintptr_t>(prepacked.const_data_ptr()) % 16 != 0) {
    fail(op, "prepacked must begin at a multiple of 16 bytes; got a view that does not");
  }
  return ternary ? WeightKind::kTernary : WeightKind::kInt8;
}

// The operands of a product and the shape [.., N] of its result.
std::vector<int64_t> check_operands(
    const LaunchContext& context, const Tensor& x_i8, const Tensor& prepacked, int64_t N, ProductArgs& args) {
  context.check_input("x_i8", x_i8, ScalarType::Char);
  const Rows rows = check_rows(context.op(), "x_i8", x_i8);
  args.kind = check_prepacked(context, prepacked, N, rows.K);
  const int64_t most = args.kind == WeightKind::kTernary ? kMaxPrepackedTernaryK : kMaxPrepackedInt8K;
  if (rows.K > most) fail(context.op(), "x_i8 must have K <= ", most, " on CUDA; got ", rows.K);
  args.x_i8 = const_data<int8_t>(x_i8);
  args.weight = prepacked.const_data_ptr();
  args.M = rows.M;
  args.N = N;
  args.K = rows.K;
  return with_last(rows.leading, N);
}

Tensor raw_product(const LaunchContext& context, const Tensor& x_i8, const Tensor& prepacked, int64_t N) {
  ProductArgs args = {};
  const std::vector<int64_t> shape = check_operands(context, x_i8, prepacked, N, args);
  Tensor out = context.new_tensor(shape, ScalarType::Int);
  args.raw = true;
  args.num_segments = 1;
  args.segment_end[0] = N;
  args.out = out.mutable_data_ptr();
  launch_product(context, args);
  return out;
}

// The canonical operand, checked, in the form the kernels read.
Tensor prepack_operand(const LaunchContext& context, const Tensor& x_i8, const Tensor& packed) {
  context.check_input("x_i8", x_i8, ScalarType::Char);
  const Rows rows = check_rows(context.op(), "x_i8", x_i8);
  check_cuda(context.op(), "packed", packed, context.device());
  check_packed(context.op(), packed, rows.K);
  return prepack(context, packed, rows.K);
}

// --- operators ------------------------------------------------------------------------------------------

Tensor int8xint2_mm_int32(const Tensor& x_i8, const Tensor& packed) {
  const LaunchContext context("int8xint2_mm_int32", x_i8);
  return raw_product(context, x_i8, prepack_operand(context, x_i8, packed), packed.size(0));
}

Tensor int8xint2_mm(const Tensor& x_i8,
                    const Tensor& act_scale,
                    const Tensor& packed,
                    const Tensor& weight_scale,
                    const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& segments,
                    ScalarType out_dtype) {
  const LaunchContext context("int8xint2_mm", x_i8);
  return scaled_product(context,
                        x_i8,
                        act_scale,
                        prepack_operand(context, x_i8, packed),
                        packed.size(0),
                        weight_scale,
                        bias,
                        segments,
                        out_dtype,
                        false);
}

Tensor prepacked_mm_int32(const Tensor& x_i8, const Tensor& prepacked, int64_t N) {
  const LaunchContext context("prepacked_mm_int32", x_i8);
  return raw_product(context, x_i8, prepacked, N);
}

Tensor prepacked_mm(const Tensor& x_i8,
                    const Tensor& act_scale,
                    const Tensor& prepacked,
                    int64_t N,
                    const Tensor& weight_scale,
                    const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& segments,
                    ScalarType out_dtype,
                    bool weight_is_constant) {
  const LaunchContext context("prepacked_mm", x_i8);
  return scaled_product(
      context, x_i8, act_scale, prepacked, N, weight_scale, bias, segments, out_dtype, weight_is_constant);
}

}  // namespace

Tensor scaled_product(const LaunchContext& context,
                      const Tensor& x_i8,
                      const Tensor& act_scale,
                      const Tensor& prepacked,
                      int64_t N,
                      const Tensor& weight_scale,
                      const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& segments,
                      ScalarType out_dtype,
                      bool weight_is_constant) {
  ProductArgs args = {};
  const std::vector<int64_t> shape = check_operands(context, x_i8, prepacked, N, args);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_numel(context.op(), "act_scale", act_scale, args.M);
  check_cuda(context.op(), "weight_scale", weight_scale, context.device());
  check_weight_scale(context.op(), weight_scale, args.N, segments);
  check_out_dtype(context.op(), "out_dtype", out_dtype);
  args.bias = context.optional_vector("bias", bias, args.N);
  args.act_scale = const_data<float>(act_scale);
  args.weight_scale = const_data<float>(weight_scale);
  args.scale_per_row = segments.empty() && weight_scale.numel() != 1;
  args.num_segments = std::max<int>(1, static_cast<int>(segments.size()));
  args.segment_end[0] = args.N;
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) args.segment_end[i] = end += segments[i];
  Tensor out = context.new_tensor(shape, out_dtype);
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out_dtype);
  args.weight_is_constant = weight_is_constant;
  launch_product(context, args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("int8xint2_mm_int32", TORCH_BOX(&int8xint2_mm_int32));
  m.impl("int8xint2_mm", TORCH_BOX(&int8xint2_mm));
  m.impl("prepacked_mm_int32", TORCH_BOX(&prepacked_mm_int32));
  m.impl("prepacked_mm", TORCH_BOX(&prepacked_mm));
}

}  // namespace bitnet_ext::cuda
