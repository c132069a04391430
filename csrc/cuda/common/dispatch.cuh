// From a run-time DType to a compile-time element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<element type>{}) and returns what it returns.
template <typename Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kFloat32:
      break;
  }
  return body(TypeTag<float>{});
}

}  // namespace bitnet_ext::cuda
