// A warpgroup's registers, handed from one to another (sm_90a). Every warp of the warpgroup calls these.
#pragma once

namespace bitnet_ext::cuda {

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace bitnet_ext::cuda
