// The canonical 2-bit layout of a ternary weight, for host and device. No torch here.
//
// codes int8 [N, K] in {-1, 0, 1}  ->  packed uint8 [N, ceil(K / 4)], row-major. Byte j of a row holds the
// weights k = 4j .. 4j + 3, the first in the low bits, each stored as code + 1:
//
//     bits   7 6    5 4    3 2    1 0
//     k     4j+3   4j+2   4j+1    4j        stored 0 -> -1, 1 -> 0, 2 -> +1; 3 is invalid
//
// Places beyond K in the last byte of a row hold weight 0 (stored 1), so equal codes give equal bytes.
#pragma once

#include <cstdint>

// Internal linkage on the host: each instruction set of csrc/cpu must keep the copy that was compiled with
// its own flags, and merged copies could leave AVX-512 code in the scalar path.
#ifdef __CUDACC__
#define BITNET_EXT_INLINE static __host__ __device__ __forceinline__
#else
#define BITNET_EXT_INLINE static inline
#endif

namespace bitnet_ext {

constexpr int kCodesPerByte = 4;
constexpr uint8_t kPackedZero = 0x55;  // four weights of 0

BITNET_EXT_INLINE int64_t packed_bytes(int64_t K) {
  return (K + kCodesPerByte - 1) / kCodesPerByte;
}

// The four stored values (code + 1, each in 0..3) of a byte, one in each byte of the result, first lowest.
BITNET_EXT_INLINE uint32_t spread_byte(uint8_t packed) {
  const uint32_t b = packed;
  return (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
}

// The inverse of spread_byte.
BITNET_EXT_INLINE uint8_t gather_byte(uint32_t stored) {
  return static_cast<uint8_t>(stored | stored >> 6 | stored >> 12 | stored >> 18);
}

// Four int8 codes -> four stored values, a byte each. The top bit is kept apart so that the +1 of a byte that
// holds -1 does not carry into the next.
BITNET_EXT_INLINE uint32_t stored_from_codes(uint32_t codes) {
  return ((codes & 0x7f7f7f7fu) + 0x01010101u) ^ (codes & 0x80808080u);
}

// The inverse: four stored values -> four int8 codes.
BITNET_EXT_INLINE uint32_t codes_from_stored(uint32_t stored) {
  return ((stored | 0x80808080u) - 0x01010101u) ^ 0x80808080u;
}

// Not zero when a stored value is outside {0, 1, 2}.
BITNET_EXT_INLINE uint32_t invalid_stored(uint32_t stored) {
  return (stored & 0xfcfcfcfcu) | (stored & stored >> 1 & 0x01010101u);
}

// Weight k of a packed row, as -1, 0 or 1 (2 for the invalid value).
BITNET_EXT_INLINE int code_at(const uint8_t* packed_row, int64_t k) {
  return static_cast<int>(packed_row[k / kCodesPerByte] >> (2 * (k % kCodesPerByte)) & 3) - 1;
}

}  // namespace bitnet_ext
