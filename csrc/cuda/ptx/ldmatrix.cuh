// Shared memory <-> the 8 x 8 blocks of 16-bit elements that tensor-core fragments are made of.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

// Four matrices of 8 rows x 16 bytes (sm_80 and newer). Lanes 8 i .. 8 i + 7 give the addresses of the rows
// of matrix i; lane l gets, of each matrix, bytes 4 (l % 4) .. + 3 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: lane l gets elements [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4].
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace bitnet_ext::cuda
