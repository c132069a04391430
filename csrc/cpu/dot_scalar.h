// The integer product in plain C++, for CPUs without kernels of their own. The compiler vectorises the inner
// loop.
#pragma once

#include "cpu/kernels.h"
#include "packing.h"

namespace bitnet_ext::cpu::scalar {
namespace {

// acc[m, n] = sum over blocks of planes[m] * stored[n], less sums[m]; see generic/product.inl.
void dot(const int8_t* planes,
         const int32_t* sums,
         int64_t tokens,
         const uint8_t* packed,
         int64_t rows,
         int64_t K,
         int32_t* acc,
         int64_t ld) {
  constexpr int64_t kBytes = kDotBlock / kCodesPerByte;
  const int64_t row_bytes = packed_bytes(K);
  const int64_t stride = (K + kDotBlock - 1) / kDotBlock * kDotBlock;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t m = 0; m < tokens; ++m) acc[m * ld + n] = -sums[m];
    for (int64_t start = 0; start < row_bytes; start += kBytes) {
      // Unpacked once for all tokens.
      const int64_t left = row_bytes - start < kBytes ? row_bytes - start : kBytes;
      const uint8_t* bytes = packed + n * row_bytes + start;
      // As int16: compilers turn the loop below into multiply-adds of 16-bit pairs, 2.3 times as fast as from
      // int8.
      int16_t stored[kDotBlock] = {};
      for (int r = 0; r < kCodesPerByte; ++r) {
        for (int64_t j = 0; j < left; ++j)
          stored[r * kBytes + j] = static_cast<int16_t>(bytes[j] >> (2 * r) & 3);
      }
      const int8_t* block = planes + start * kCodesPerByte;
      for (int64_t m = 0; m < tokens; ++m) {
        int32_t sum = 0;
        for (int i = 0; i < kDotBlock; ++i) sum += stored[i] * block[m * stride + i];
        acc[m * ld + n] += sum;
      }
    }
  }
}

}  // namespace
}  // namespace bitnet_ext::cpu::scalar
