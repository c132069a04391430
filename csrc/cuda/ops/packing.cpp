// Operators between the codes, their packed and prepacked forms and floats.
#include "packing.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/launch_context.h"
#include "cuda/ops/parts.h"
#include "cuda/pack.h"
#include "cuda/prepack.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

// The shape of prepacked ternary weights: a vector of four words for each lane of each block.
std::vector<int64_t> ternary_shape(int64_t N, int64_t K) {
  return {block_rows(N), block_cols(K), kLanes, kStepsPerBlock};
}

void check_prepacked(const LaunchContext& context, const Tensor& prepacked, int64_t N, int64_t K) {
  context.check_input("prepacked", prepacked, ScalarType::Int);
  if (N < 1 || K < 1) fail(context.op(), "N and K must be >= 1; got ", N, " and ", K);
  if (shape_of(prepacked) != ternary_shape(N, K)) {
    fail(context.op(),
         "prepacked must have shape ",
         shape_text(ternary_shape(N, K)),
         " for N = ",
         N,
         " and K = ",
         K,
         "; got ",
         shape_text(prepacked));
  }
}

void check_weight_scales(const LaunchContext& context, const Tensor& weight_scale, int64_t N) {
  context.check_input("weight_scale", weight_scale, ScalarType::Float);
  const int64_t scales = weight_scale.numel();
  if (scales != 1 && scales != N) {
    fail(context.op(), "weight_scale must have 1 or N = ", N, " element(s); got ", scales);
  }
}

Tensor pack_ternary(const Tensor& codes) {
  const LaunchContext context("pack_ternary", codes);
  context.check_input("codes", codes, ScalarType::Char);
  check_matrix(context.op(), "codes", codes);
  const int64_t N = codes.size(0), K = codes.size(1);
  Tensor packed = context.new_tensor({N, packed_bytes(K)}, ScalarType::Byte);
  context.check(
      launch_pack_ternary(const_data<int8_t>(codes), N, K, data<uint8_t>(packed), context.stream()));
  return packed;
}

Tensor unpack_ternary(const Tensor& packed, int64_t K) {
  const LaunchContext context("unpack_ternary", packed);
  check_packed(context.op(), packed, K);
  const int64_t N = packed.size(0);
  Tensor codes = context.new_tensor({N, K}, ScalarType::Char);
  context.check(
      launch_unpack_ternary(const_data<uint8_t>(packed), N, K, data<int8_t>(codes), context.stream()));
  return codes;
}

Tensor dequantize_ternary(const Tensor& packed, const Tensor& weight_scale, int64_t K, ScalarType dtype) {
  const LaunchContext context("dequantize_ternary", packed);
  check_packed(context.op(), packed, K);
  const int64_t N = packed.size(0);
  check_weight_scales(context, weight_scale, N);
  check_out_dtype(context.op(), "dtype", dtype);
  Tensor out = context.new_tensor({N, K}, dtype);
  context.check(launch_dequantize_ternary(const_data<uint8_t>(packed),
                                          const_data<float>(weight_scale),
                                          weight_scale.numel() != 1,
                                          N,
                                          K,
                                          dtype_of(dtype),
                                          out.mutable_data_ptr(),
                                          context.stream()));
  return out;
}

Tensor prepack_ternary(const Tensor& packed, int64_t K) {
  return prepack(LaunchContext("prepack_ternary", packed), packed, K);
}

Tensor unprepack_ternary(const Tensor& prepacked, int64_t N, int64_t K) {
  const LaunchContext context("unprepack_ternary", prepacked);
  check_prepacked(context, prepacked, N, K);
  if (reinterpret_cast<uintptr_t>(prepacked.const_data_ptr()) % 16 != 0) {
    fail(context.op(), "prepacked must start at a multiple of 16 bytes; got a view that does not");
  }
  Tensor packed = context.new_tensor({N, packed_bytes(K)}, ScalarType::Byte);
  context.check(
      launch_unprepack_ternary(prepacked.const_data_ptr(), N, K, data<uint8_t>(packed), context.stream()));
  return packed;
}

Tensor prepack_int8(const Tensor& codes) {
  const LaunchContext context("prepack_int8", codes);
  context.check_input("codes", codes, ScalarType::Char);
  check_matrix(context.op(), "codes", codes);
  const int64_t N = codes.size(0), K = codes.size(1);
  Tensor prepacked =
      context.new_tensor({block_rows(N), block_cols(K), kStepsPerBlock, kLanes, 4}, ScalarType::Int);
  context.check(
      launch_prepack_int8(const_data<int8_t>(codes), N, K, prepacked.mutable_data_ptr(), context.stream()));
  return prepacked;
}

Tensor dequantize_prepacked(
    const Tensor& prepacked, const Tensor& weight_scale, int64_t N, int64_t K, ScalarType dtype) {
  const LaunchContext context("dequantize_prepacked", prepacked);
  check_prepacked(context, prepacked, N, K);
  check_weight_scales(context, weight_scale, N);
  check_out_dtype(context.op(), "dtype", dtype);
  Tensor out = context.new_tensor({N, K}, dtype);
  context.check(launch_dequantize_prepacked(prepacked.const_data_ptr(),
                                            const_data<float>(weight_scale),
                                            weight_scale.numel() != 1,
                                            N,
                                            K,
                                            dtype_of(dtype),
                                            out.mutable_data_ptr(),
                                            context.stream()));
  return out;
}

Tensor dequantize_act(const Tensor& x_i8, const Tensor& act_scale, ScalarType dtype) {
  const LaunchContext context("dequantize_act", x_i8);
  context.check_input("x_i8", x_i8, ScalarType::Char);
  context.check_input("act_scale", act_scale, ScalarType::Float);
  check_out_dtype(context.op(), "dtype", dtype);
  const Rows rows = check_rows(context.op(), "x_i8", x_i8);
  check_numel(context.op(), "act_scale", act_scale, rows.M);
  Tensor out = context.new_tensor(with_last(rows.leading, rows.K), dtype);
  context.check(launch_dequantize_act(const_data<int8_t>(x_i8),
                                      const_data<float>(act_scale),
                                      rows.M,
                                      rows.K,
                                      dtype_of(dtype),
                                      out.mutable_data_ptr(),
                                      context.stream()));
  return out;
}

}  // namespace

Tensor prepack(const LaunchContext& context, const Tensor& packed, int64_t K) {
  check_cuda(context.op(), "packed", packed, context.device());
  check_packed(context.op(), packed, K);
  const int64_t N = packed.size(0);
  Tensor prepacked = context.new_tensor(ternary_shape(N, K), ScalarType::Int);
  context.check(launch_prepack_ternary(
      const_data<uint8_t>(packed), N, K, prepacked.mutable_data_ptr(), context.stream()));
  return prepacked;
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CUDA, m) {
  m.impl("pack_ternary", TORCH_BOX(&pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&unpack_ternary));
  m.impl("dequantize_ternary", TORCH_BOX(&dequantize_ternary));
  m.impl("prepack_ternary", TORCH_BOX(&prepack_ternary));
  m.impl("unprepack_ternary", TORCH_BOX(&unprepack_ternary));
  m.impl("prepack_int8", TORCH_BOX(&prepack_int8));
  m.impl("dequantize_prepacked", TORCH_BOX(&dequantize_prepacked));
  m.impl("dequantize_act", TORCH_BOX(&dequantize_act));
}

}  // namespace bitnet_ext::cuda
