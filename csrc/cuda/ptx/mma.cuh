// Tensor-core multiply-accumulate of 8-bit integers (sm_80 and newer).
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// c[16x8] += a[16x32] * b[32x8], int8 operands, int32 sums that wrap (exact while the result fits).
// With g = lane / 4 and t = lane % 4, byte j of a register is:
//   a0: A[g][4t + j]   a1: A[g + 8][4t + j]   a2: A[g][16 + 4t + j]   a3: A[g + 8][16 + 4t + j]
//   b0: B[4t + j][g]   b1: B[16 + 4t + j][g]
// and c[0], c[1] are C[g][2t], C[g][2t + 1]; c[2], c[3] the same of row g + 8.
__device__ __forceinline__ void mma_m16n8k32_s8(
    int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace bitnet_ext::cuda
