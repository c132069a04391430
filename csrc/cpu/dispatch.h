// Which kernel table the operators use: the best one this CPU runs, chosen once, unless the environment
// variable BITNET_EXT_CPU_ISA or the operator _set_cpu_isa names another.
#pragma once

#include "cpu/features.h"
#include "cpu/kernels.h"

namespace bitnet_ext::cpu {

// Throws one sentence when BITNET_EXT_CPU_ISA is unknown or not supported here.
const Kernels& kernels();

}  // namespace bitnet_ext::cpu
