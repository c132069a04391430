// Conversions into and out of the prepacked layout of csrc/prepacked.h. Prepacked pointers are 16-byte
// aligned, except that dequantisation takes any; the other matrices may start anywhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// Canonical packed uint8 [N, ceil(K / 4)] -> prepacked ternary; the invalid stored value 3 becomes +1.
cudaError_t launch_prepack_ternary(
    const uint8_t* packed, int64_t N, int64_t K, void* prepacked, cudaStream_t stream);

// The inverse.
cudaError_t launch_unprepack_ternary(
    const void* prepacked, int64_t N, int64_t K, uint8_t* packed, cudaStream_t stream);

// int8 [N, K] -> prepacked int8.
cudaError_t launch_prepack_int8(
    const int8_t* codes, int64_t N, int64_t K, void* prepacked, cudaStream_t stream);

// out[n, k] = code * weight_scale of prepacked ternary weights; weight_scale of 1 (scale_per_row false) or N
// values.
cudaError_t launch_dequantize_prepacked(const void* prepacked,
                                        const float* weight_scale,
                                        bool scale_per_row,
                                        int64_t N,
                                        int64_t K,
                                        DType dtype,
                                        void* out,
                                        cudaStream_t stream);

}  // namespace bitnet_ext::cuda
