// Kernels for AVX-512 F, BW, VL, DQ and VNNI (Ice Lake, Zen 4 and later). Compiled with those flags, run only
// where cpuid shows them.
#include "cpu/dot_avx512.h"
#include "cpu/vec_avx512.h"

#define BITNET_EXT_ISA avx512
#define BITNET_EXT_ISA_NAME "avx512"
#include "cpu/generic/table.inl"

namespace bitnet_ext::cpu {

const Kernels& avx512_kernels() {
  return avx512::kTable;
}

}  // namespace bitnet_ext::cpu
