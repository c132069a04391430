// The order of K in which packed weights and int8 activations meet.
//
// A 32-bit word of packed weights holds the codes k = 0 .. 15; byte j holds k = 4j .. 4j + 3. Shifting by 2r
// and masking leaves, in byte j, the stored code of k = 4j + r: plane r. Four planes cost 4 masks and 3
// shifts for 16 weights, while any unpacking into the natural order costs several times that. So the
// activations take the same order instead: their 16 bytes, as a 4 x 4 matrix, are transposed once, when they
// are staged, and plane r of the weights meets word r of the activations.
//
// Stored codes are t + 1, so with c = t + 1:  sum t * x = sum c * x - sum x.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

constexpr uint32_t kPlaneMask = 0x03030303u;
constexpr int kOnes = 0x01010101;

template <int kPlane>
__device__ __forceinline__ uint32_t weight_plane(uint32_t word) {
  return word >> (2 * kPlane) & kPlaneMask;
}

// Byte j of result word r is byte r of input word j.
__device__ __forceinline__ uint4 activation_planes(uint4 x) {
  const uint32_t low_01 = __byte_perm(x.x, x.y, 0x5140);
  const uint32_t low_23 = __byte_perm(x.z, x.w, 0x5140);
  const uint32_t high_01 = __byte_perm(x.x, x.y, 0x7362);
  const uint32_t high_23 = __byte_perm(x.z, x.w, 0x7362);
  return make_uint4(__byte_perm(low_01, low_23, 0x5410),
                    __byte_perm(low_01, low_23, 0x7632),
                    __byte_perm(high_01, high_23, 0x5410),
                    __byte_perm(high_01, high_23, 0x7632));
}

// Sum of the 16 signed bytes, added to `sum`.
__device__ __forceinline__ int add_bytes(uint4 x, int sum) {
  sum = __dp4a(static_cast<int>(x.x), kOnes, sum);
  sum = __dp4a(static_cast<int>(x.y), kOnes, sum);
  sum = __dp4a(static_cast<int>(x.z), kOnes, sum);
  return __dp4a(static_cast<int>(x.w), kOnes, sum);
}

// The first `valid` of 16 bytes at any address, zero beyond.
__device__ __forceinline__ uint4 load_bytes_16(const void* address, int64_t valid) {
  const uint8_t* bytes = static_cast<const uint8_t*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < valid) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace bitnet_ext::cuda
