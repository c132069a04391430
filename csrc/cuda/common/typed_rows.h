// A tensor [M, K] whose element type is known at run time. Free of torch and of CUDA.
#pragma once

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct TypedRows {
  void* base;      // null: the tensor is absent. Inputs are not written
  int64_t stride;  // elements from row to row
  DType dtype;
};

}  // namespace bitnet_ext::cuda
