// Descriptors of matrices for the bulk tensor copy engine (host side).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

// A tensor of up to 3 dimensions, the fastest first, of which boxes are copied.
struct TensorMapSpec {
  CUtensorMapDataType type;
  uint32_t rank;
  cuuint64_t sizes[3];
  cuuint64_t strides[2];  // bytes, of dimensions 1 and 2
  cuuint32_t box[3];
  CUtensorMapSwizzle swizzle;
};

// The encoder is a driver function; it is asked for by name, so that the module loads where no driver is.
inline cudaError_t make_tensor_map(const TensorMapSpec& spec, const void* data, CUtensorMap* map) {
  using Encode = CUresult (*)(CUtensorMap*,
                              CUtensorMapDataType,
                              cuuint32_t,
                              void*,
                              const cuuint64_t*,
                              const cuuint64_t*,
                              const cuuint32_t*,
                              const cuuint32_t*,
                              CUtensorMapInterleave,
                              CUtensorMapSwizzle,
                              CUtensorMapL2promotion,
                              CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                          : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode(map,
                                 spec.type,
                                 spec.rank,
                                 const_cast<void*>(data),
                                 spec.sizes,
                                 spec.strides,
                                 spec.box,
                                 steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 spec.swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace bitnet_ext::cuda
