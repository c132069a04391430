// The portable kernels, compiled with the baseline flags of the build. Every other file must match their
// bits.
#include "cpu/dot_scalar.h"
#include "cpu/vec_scalar.h"

#define BITNET_EXT_ISA scalar
#define BITNET_EXT_ISA_NAME "scalar"
#include "cpu/generic/table.inl"

namespace bitnet_ext::cpu {

const Kernels& scalar_kernels() {
  return scalar::kTable;
}

}  // namespace bitnet_ext::cpu
