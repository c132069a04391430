// Tensor-core multiply-accumulate of 16-bit floats with fp32 sums (sm_80 and newer).
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// c[16x8] += a[16x16] * b[16x8]. With g = lane / 4 and t = lane % 4, the halves of a register, low first,
// are:
//   a0: A[g][2t], A[g][2t + 1]          a1: the same of row g + 8
//   a2: A[g][2t + 8], A[g][2t + 9]      a3: the same of row g + 8
//   b0: B[2t][g], B[2t + 1][g]          b1: B[2t + 8][g], B[2t + 9][g]
// and c[0], c[1] are C[g][2t], C[g][2t + 1]; c[2], c[3] the same of row g + 8. Products are exact; each
// addition to c chops instead of rounding.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4],
                                                  const uint32_t (&a)[4],
                                                  uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4],
                                                 const uint32_t (&a)[4],
                                                 uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace bitnet_ext::cuda
