// Operators that convert between int8 codes, the 2-bit layout, the prepacked layout and floating-point
// weights.
//
// The products of the CPU read the canonical layout. The prepacked one (csrc/prepacked.h) is converted here
// for weights that come from a GPU or go to one, byte by byte in plain loops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/operators.h"
#include "prepacked.h"

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

Tensor dequantize(
    const char* op, const Tensor& packed, const Tensor& weight_scale, int64_t K, ScalarType dtype) {
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

Tensor dequantize_ternary(const Tensor& packed, const Tensor& weight_scale, int64_t K, ScalarType dtype) {
  return dequantize("dequantize_ternary", packed, weight_scale, K, dtype);
}

constexpr int64_t kBlockWords = kTernaryBlockBytes / 4;
constexpr uint32_t kLowPairs = 0x03030303u;  // the lowest pair of each byte

// The place of a canonical byte: byte i of prepacked word `word` has its weight i at the bits `shift` and
// `shift` + 1.
struct Place {
  int64_t word;
  int shift;
};

Place place_of(int64_t row, int64_t byte, int64_t blocks_wide) {
  constexpr int64_t kBlockBytes = kBlockCols / kCodesPerByte;
  const int64_t block = row / kBlockRows * blocks_wide + byte / kBlockBytes;
  const int64_t g = row % 8, t = byte % 4, step = byte % kBlockBytes / 8;
  const int64_t j = row % kBlockRows / 8 + 2 * (byte % 8 / 4);
  return {block * kBlockWords + (4 * g + t) * kStepsPerBlock + step, static_cast<int>(6 - 2 * j)};
}

// The stored values (code + 1) of a byte beyond the `valid` first become 1, which is code 0.
uint32_t clear_tail(uint32_t stored, int64_t valid) {
  for (int64_t i = std::max<int64_t>(0, valid); i < kCodesPerByte; ++i) {
    stored = (stored & ~(3u << (8 * i))) | 1u << (8 * i);
  }
  return stored;
}

std::vector<int64_t> ternary_shape(int64_t N, int64_t K) {
  return {block_rows(N), block_cols(K), kLanes, kStepsPerBlock};
}

void check_prepacked(const char* op, const Tensor& prepacked, int64_t N, int64_t K) {
  check_input(op, "prepacked", prepacked, ScalarType::Int);
  if (N < 1 || K < 1) fail(op, "N and K must be >= 1; got ", N, " and ", K);
  if (shape_of(prepacked) != ternary_shape(N, K)) {
    fail(op,
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

Tensor prepack_ternary(const Tensor& packed, int64_t K) {
  const char* op = "prepack_ternary";
  check_cpu(op, "packed", packed);
  check_packed(op, packed, K);
  const int64_t N = packed.size(0), row_bytes = packed_bytes(K), wide = block_cols(K);
  Tensor prepacked = new_tensor(ternary_shape(N, K), ScalarType::Int);
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = static_cast<uint32_t*>(prepacked.mutable_data_ptr());
  std::atomic<bool> valid{true};
  parallel_for(0, block_rows(N), grain_for(wide * kTernaryBlockBytes), [&](int64_t begin, int64_t end) {
    std::fill(out + begin * wide * kBlockWords, out + end * wide * kBlockWords, 0u);
    uint32_t invalid = 0;
    for (int64_t row = begin * kBlockRows; row < std::min(N, end * kBlockRows); ++row) {
      for (int64_t byte = 0; byte < row_bytes; ++byte) {
        const uint32_t stored = clear_tail(spread_byte(in[row * row_bytes + byte]), K - byte * kCodesPerByte);
        invalid |= invalid_stored(stored);
        const auto [word, shift] = place_of(row, byte, wide);
        out[word] |= ((stored + kLowPairs) & kLowPairs) << shift;  // stored - 1 modulo 4
      }
    }
    if (invalid != 0) valid = false;
  });
  if (!valid) fail(op, "packed holds the invalid stored value 3; accepted are 0, 1 and 2");
  return prepacked;
}

Tensor unprepack(const char* op, const Tensor& prepacked, int64_t N, int64_t K) {
  check_prepacked(op, prepacked, N, K);
  const int64_t row_bytes = packed_bytes(K), wide = block_cols(K);
  Tensor packed = new_tensor({N, row_bytes}, ScalarType::Byte);
  const auto* in = static_cast<const uint32_t*>(prepacked.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  parallel_for(0, N, grain_for(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t byte = 0; byte < row_bytes; ++byte) {
        const auto [word, shift] = place_of(row, byte, wide);
        // The pair 10, which no code has, becomes the stored value 3, which the operators refuse.
        const uint32_t stored = ((in[word] >> shift & kLowPairs) + 0x01010101u) & kLowPairs;
        out[row * row_bytes + byte] = gather_byte(clear_tail(stored, K - byte * kCodesPerByte));
      }
    }
  });
  return packed;
}

Tensor unprepack_ternary(const Tensor& prepacked, int64_t N, int64_t K) {
  return unprepack("unprepack_ternary", prepacked, N, K);
}

Tensor prepack_int8(const Tensor& codes) {
  const char* op = "prepack_int8";
  check_input(op, "codes", codes, ScalarType::Char);
  check_matrix(op, "codes", codes);
  const int64_t N = codes.size(0), K = codes.size(1), wide = block_cols(K);
  Tensor prepacked = new_tensor({block_rows(N), wide, kStepsPerBlock, kLanes, 4}, ScalarType::Int);
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  auto* out = static_cast<int8_t*>(prepacked.mutable_data_ptr());
  const int64_t row_of_blocks = wide * kInt8BlockBytes;
  parallel_for(0, block_rows(N), grain_for(row_of_blocks), [&](int64_t begin, int64_t end) {
    std::fill(out + begin * row_of_blocks, out + end * row_of_blocks, int8_t{0});
    for (int64_t row = begin * kBlockRows; row < std::min(N, end * kBlockRows); ++row) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t block = row / kBlockRows * wide + k / kBlockCols;
        const int64_t g = row % 8, t = k % 16 / 4, step = k % kBlockCols / 32, i = k % 4;
        const int64_t j = row % kBlockRows / 8 + 2 * (k % 32 / 16);
        const int64_t vector = (block * kStepsPerBlock + step) * kLanes + 4 * g + t;
        out[vector * 16 + 4 * j + i] = in[row * K + k];
      }
    }
  });
  return prepacked;
}

Tensor dequantize_prepacked(
    const Tensor& prepacked, const Tensor& weight_scale, int64_t N, int64_t K, ScalarType dtype) {
  const char* op = "dequantize_prepacked";
  return dequantize(op, unprepack(op, prepacked, N, K), weight_scale, K, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("pack_ternary", TORCH_BOX(&pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&unpack_ternary));
  m.impl("dequantize_ternary", TORCH_BOX(&dequantize_ternary));
  m.impl("prepack_ternary", TORCH_BOX(&prepack_ternary));
  m.impl("unprepack_ternary", TORCH_BOX(&unprepack_ternary));
  m.impl("prepack_int8", TORCH_BOX(&prepack_int8));
  m.impl("dequantize_prepacked", TORCH_BOX(&dequantize_prepacked));
}

}  // namespace bitnet_ext::cpu
