// Operators that convert between int8 codes, the 2-bit layout and floating-point weights.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

Tensor pack_ternary(const Tensor& codes) {
  const char* op = "pack_ternary";
  check_input(op, "codes", codes, ScalarType::Char);
  check_matrix(op, "codes", codes);
  const Kernels& table = kernels();
  const int64_t N = codes.size(0), K = codes.size(1);
  Tensor packed = new_tensor({N, packed_bytes(K)}, ScalarType::Byte);
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> valid{true};
  parallel_for(0, N, grain_for(K), [&](int64_t begin, int64_t end) {
    if (!table.pack(in + begin * K, end - begin, K, out + begin * packed_bytes(K))) valid = false;
  });
  if (!valid) fail(op, "codes hold a value outside {-1, 0, 1}");
  return packed;
}

Tensor unpack_ternary(const Tensor& packed, int64_t K) {
  const char* op = "unpack_ternary";
  check_cpu(op, "packed", packed);
  check_packed(op, packed, K);
  const Kernels& table = kernels();
  const int64_t N = packed.size(0);
  Tensor codes = new_tensor({N, K}, ScalarType::Char);
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  std::atomic<bool> valid{true};
  parallel_for(0, N, grain_for(K), [&](int64_t begin, int64_t end) {
    if (!table.unpack(in + begin * packed_bytes(K), end - begin, K, out + begin * K)) valid = false;
  });
  if (!valid) fail(op, "packed holds the invalid stored value 3; accepted are 0, 1 and 2");
  return codes;
}

Tensor dequantize_ternary(const Tensor& packed, const Tensor& weight_scale, int64_t K, ScalarType dtype) {
  const char* op = "dequantize_ternary";
  check_cpu(op, "packed", packed);
  check_packed(op, packed, K);
  check_input(op, "weight_scale", weight_scale, ScalarType::Float);
  check_out_dtype(op, "dtype", dtype);
  const Kernels& table = kernels();
  const int64_t N = packed.size(0);
  const int64_t scales = weight_scale.numel();
  if (scales != 1 && scales != N)
    fail(op, "weight_scale must have 1 or N = ", N, " element(s); got ", scales);
  const int64_t scale_stride = scales == 1 ? 0 : 1;
  Tensor weight = new_tensor({N, K}, dtype);
  const int64_t row_bytes = K * static_cast<int64_t>(weight.element_size());
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* scale = static_cast<const float*>(weight_scale.const_data_ptr());
  auto* out = static_cast<char*>(weight.mutable_data_ptr());
  std::atomic<bool> valid{true};
  parallel_for(0, N, grain_for(row_bytes), [&](int64_t begin, int64_t end) {
    if (!table.dequantize_ternary(in + begin * packed_bytes(K),
                                  scale + begin * scale_stride,
                                  scale_stride,
                                  end - begin,
                                  K,
                                  dtype_of(dtype),
                                  out + begin * row_bytes)) {
      valid = false;
    }
  });
  if (!valid) fail(op, "packed holds the invalid stored value 3; accepted are 0, 1 and 2");
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("pack_ternary", TORCH_BOX(&pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&unpack_ternary));
  m.impl("dequantize_ternary", TORCH_BOX(&dequantize_ternary));
}

}  // namespace bitnet_ext::cpu
