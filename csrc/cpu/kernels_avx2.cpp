// Kernels for AVX2 with FMA and F16C (Haswell, Zen and later). Compiled with those flags, run only where
// cpuid shows them.
#include "cpu/dot_avx2.h"
#include "cpu/vec_avx2.h"

#define BITNET_EXT_ISA avx2
#define BITNET_EXT_ISA_NAME "avx2"
#include "cpu/generic/table.inl"

namespace bitnet_ext::cpu {

const Kernels& avx2_kernels() {
  return avx2::kTable;
}

}  // namespace bitnet_ext::cpu
