// The two kinds of prepacked weights as the kernels see them (csrc/prepacked.h has the layout).
#pragma once

#include <cstdint>

#include "prepacked.h"

namespace bitnet_ext::cuda {

struct TernaryWeight {
  static constexpr int kVectors = 1;  // 16-byte vectors a lane holds of a block of 16 x 128
  static constexpr int kShift = 6;    // log2 of the factor in the sums

  // Operand A of a step, every weight times 64. `step` has to be known to the compiler.
  static __device__ __forceinline__ void fragment(const uint4 (&v)[kVectors], int step, uint32_t (&a)[4]) {
    const uint32_t word = step == 0 ? v[0].x : step == 1 ? v[0].y : step == 2 ? v[0].z : v[0].w;
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

  static __device__ __forceinline__ void fragment(const uint4 (&v)[kVectors], int step, uint32_t (&a)[4]) {
    a[0] = v[step].x;
    a[1] = v[step].y;
    a[2] = v[step].z;
    a[3] = v[step].w;
  }
};

}  // namespace bitnet_ext::cuda
