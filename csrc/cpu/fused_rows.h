// What the operators share that compute rows of a transformer block and quantise or normalise them from the
// cache.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {

// Calls body(T{}) for the element type of `dtype`.
template <typename Body>
void dispatch_float(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    case ScalarType::Half:
      return body(c10::Half{});
    default:
      return body(0.0f);
  }
}

inline int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// -1 for NaN, else 0. Selections here are by masks: a branch in a loop keeps compilers from vectorising it.
inline int32_t nan_mask(int32_t bits) {
  return (0x7f800000 - (bits & 0x7fffffff)) >> 31;
}

template <typename T>
inline float to_float(T v) {
  return static_cast<float>(v);
}
inline float to_float(c10::BFloat16 v) {
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(v.x) << 16));
}

// Rounds to nearest even.
template <typename T>
inline T from_float(float v) {
  return static_cast<T>(v);
}
template <>
inline c10::BFloat16 from_float<c10::BFloat16>(float v) {
  const int32_t bits = bits_of(v), nan = nan_mask(bits);
  const uint32_t word = static_cast<uint32_t>(bits);
  const uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1)) >> 16;
  const uint32_t out = (rounded & static_cast<uint32_t>(~nan)) | (0x7fc0u & static_cast<uint32_t>(nan));
  return c10::BFloat16(static_cast<uint16_t>(out), c10::BFloat16::from_bits());
}

struct Norm {
  bool enabled;
  const float* gain;  // [K] or null
  double eps;
};

// `rstd` is written only with the norm, and may be null.
inline bool quantize_row(const void* row,
                         ScalarType dtype,
                         const Norm& norm,
                         int64_t K,
                         int8_t* x_i8,
                         float* act_scale,
                         float* rstd = nullptr) {
  const Kernels& table = kernels();
  if (!norm.enabled) return table.quantize_act(row, dtype_of(dtype), 1, K, x_i8, act_scale);
  float unused = 0.0f;
  return table.rms_norm_quantize(
      row, dtype_of(dtype), norm.gain, norm.eps, 1, K, x_i8, act_scale, rstd ? rstd : &unused);
}

// `zero_row`: the rstd of a row is Inf.
[[noreturn]] inline void fail_not_finite(
    const char* op, const char* gain_arg, const char* what, const Norm& norm, int64_t K, bool zero_row) {
  const bool has_gain = norm.enabled && norm.gain != nullptr;
  if (has_gain && !std::all_of(norm.gain, norm.gain + K, [](float g) { return std::isfinite(g); })) {
    fail(op, gain_arg, " holds NaN or Inf; accepted are finite values");
  }
  if (zero_row) fail_zero_row(op, gain_arg);
  fail(op,
       what,
       " holds NaN or Inf",
       has_gain ? " (by itself or multiplied by the gain)" : "",
       "; accepted are finite values");
}

// Calls body(first, rows, partial) for blocks of rows, in parallel, and adds their partial sums [K], which
// are zero at first, in order: the blocks depend on M only, so the number of threads does not show. At most
// 256 blocks bound the partial sums to 1 kB a feature. `sum` may be null: then partial is.
template <typename Body>
void for_row_blocks(int64_t M, int64_t K, int64_t row_bytes, float* sum, Body&& body) {
  constexpr int64_t kMinBlockRows = 16;
  constexpr int64_t kMaxBlocks = 256;
  const int64_t block_rows = std::max(kMinBlockRows, (M + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (M + block_rows - 1) / block_rows;
  std::vector<float> partial(static_cast<size_t>(sum ? blocks * K : 0), 0.0f);
  torch::stable::parallel_for(0, blocks, grain_for(block_rows * row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_rows;
      body(first, std::min(block_rows, M - first), sum ? partial.data() + b * K : nullptr);
    }
  });
  if (!sum) return;
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, K, grain_for(blocks * 4), [&](int64_t begin, int64_t end) {
    std::fill(sum + begin, sum + end, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      table.add_to(sum + begin, partial.data() + b * K + begin, end - begin);
    }
  });
}

}  // namespace bitnet_ext::cpu
