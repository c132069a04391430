// The two kinds of prepacked weights as the kernels see them (csrc/prepacked.h has the layout).
#pragma once

#include <cstdint>

#include "prepacked.h"

namespace bitnet_ext::cuda {

struct TernaryWeight {
  static constexpr int kVectors = 1;  // 16-byte vectors a lane holds of a block of 16 x 128
  static constexpr int kShift = 6;    // log2 of the factor in the sums

  // Operand A of step `kStep`, every weight times 64.
  template <int kStep>
  static __device__ __forceinline__ void fragment(const uint4 (&v)[kVectors], uint32_t (&a)[4]) {
    const uint32_t word = kStep == 0 ? v[0].x : kStep == 1 ? v[0].y : kStep == 2 ? v[0].z : v[0].w;
    constexpr uint32_t kTopBits = 0xC0C0C0C0u;
    a[0] = word & kTopBits;
    a[1] = word << 2 & kTopBits;
    a[2] = word << 4 & kTopBits;
    a[3] = word << 6 & kTopBits;
  }
};

struct Int8Weight {
  static constexpr int kVectors = 4;
  static constexpr int kShift = 0;

  template <int kStep>
  static __device__ __forceinline__ void fragment(const uint4 (&v)[kVectors], uint32_t (&a)[4]) {
    a[0] = v[kStep].x;
    a[1] = v[kStep].y;
    a[2] = v[kStep].z;
    a[3] = v[kStep].w;
  }
};

}  // namespace bitnet_ext::cuda
