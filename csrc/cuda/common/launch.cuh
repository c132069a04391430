// Kernel launches with the attributes that the <<< >>> form cannot express.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace bitnet_ext::cuda {

// `dependent`: allow the kernel to start before the one ahead of it in the stream has finished (sm_90 and
// newer; see ptx/dependent_launch.cuh for what the kernel owes in return).
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...),
                          dim3 grid,
                          dim3 block,
                          size_t shared_bytes,
                          cudaStream_t stream,
                          bool dependent,
                          Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace bitnet_ext::cuda
