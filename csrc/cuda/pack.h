// The 2-bit layout of packing.h on the device: pack, unpack, and the float forms of codes and activations.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// codes int8 [N, K] -> packed uint8 [N, ceil(K / 4)]; codes outside {-1, 0, 1} are clamped.
cudaError_t launch_pack_ternary(
    const int8_t* codes, int64_t N, int64_t K, uint8_t* packed, cudaStream_t stream);

// packed -> codes int8 [N, K]; the invalid stored value 3 becomes +1.
cudaError_t launch_unpack_ternary(
    const uint8_t* packed, int64_t N, int64_t K, int8_t* codes, cudaStream_t stream);

// out[n, k] = code * weight_scale, weight_scale of 1 (scale_per_row false) or N values.
cudaError_t launch_dequantize_ternary(const uint8_t* packed,
                                      const float* weight_scale,
                                      bool scale_per_row,
                                      int64_t N,
                                      int64_t K,
                                      DType dtype,
                                      void* out,
                                      cudaStream_t stream);

// out[m, k] = x_i8 * act_scale[m].
cudaError_t launch_dequantize_act(const int8_t* x_i8,
                                  const float* act_scale,
                                  int64_t M,
                                  int64_t K,
                                  DType dtype,
                                  void* out,
                                  cudaStream_t stream);

}  // namespace bitnet_ext::cuda
