// Kernel launches with the attributes that the <<< >>> form cannot express.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace bitnet_ext::cuda {

// `dependent`: allow the kernel to start before the one ahead of it in the stream has finished (sm_90 and
// newer; see ptx/dependent_launch.cuh for what the kernel owes in return). `cluster`: so many blocks of the
// grid, which is a multiple of it, share a cluster; 1 for none.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...),
                            int cluster,
                            dim3 grid,
                            dim3 block,
                            size_t shared_bytes,
                            cudaStream_t stream,
                            bool dependent,
                            Args&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...),
                          dim3 grid,
                          dim3 block,
                          size_t shared_bytes,
                          cudaStream_t stream,
                          bool dependent,
                          Args&&... args) {
  return launch_clusters(
      kernel, 1, grid, block, shared_bytes, stream, dependent, std::forward<Args>(args)...);
}

// For kernels that take long, need hardly any shared memory and run beside those of another stream, and for
// what comes right before them: their share of L1 and shared memory that is the latter, 100 of 228 KB on
// sm_90. A multiprocessor is divided anew only when nothing runs on it, so the few KB that the driver picks
// would keep away every block that needs more until such a kernel ends: 40 us of each step of collapse-256.
constexpr int kSharedBesidePercent = 35;

template <typename... Params>
cudaError_t leave_shared_memory(void (*kernel)(Params...)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kSharedBesidePercent);
}

}  // namespace bitnet_ext::cuda
