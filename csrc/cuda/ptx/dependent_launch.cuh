// Programmatic dependent launch: a kernel may start while the one before it in the stream still runs.
//
// Every kernel that is launched so must call wait_for_previous_kernel before it reads what an earlier kernel
// wrote and before it writes anything. It calls allow_next_kernel only after that: then at most two kernels
// overlap, and what a kernel reads before its wait may be written by any kernel but the last.
#pragma once

namespace bitnet_ext::cuda {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace bitnet_ext::cuda
