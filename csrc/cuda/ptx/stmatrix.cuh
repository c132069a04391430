// The inverse of ldmatrix (sm_90).
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace bitnet_ext::cuda {

// Four 8 x 8 matrices of 16-bit elements: lane l holds elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1)
// of each matrix, and row r of matrix i goes to the 16 bytes that lane 8 i + r names.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]),
               "r"(r[1]),
               "r"(r[2]),
               "r"(r[3])
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, each transposed on the way: lane l holds elements (l / 4, 2 (l %
// 4)) and (l / 4, 2 (l % 4) + 1) of each matrix, and column c of matrix i goes to the 16 bytes that lane 8 i
// + c names.
__device__ __forceinline__ void stmatrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]),
      "r"(r[1]),
      "r"(r[2]),
      "r"(r[3])
      : "memory");
}

}  // namespace bitnet_ext::cuda
