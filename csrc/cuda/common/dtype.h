// The floating-point types the kernels read and write. Free of torch and of CUDA headers, so that both the
// operators (compiled by the host compiler) and the kernels (compiled by nvcc) can include it.
#pragma once

namespace bitnet_ext::cuda {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace bitnet_ext::cuda
