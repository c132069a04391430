#include "cpu/operators.h"

namespace bitnet_ext::cpu {

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t code = 0;
  switch (dtype) {
    case ScalarType::BFloat16:
      code = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      code = aoti_torch_dtype_float16();
      break;
    case ScalarType::Double:
      code = aoti_torch_dtype_float64();
      break;
    case ScalarType::Char:
      code = aoti_torch_dtype_int8();
      break;
    case ScalarType::Byte:
      code = aoti_torch_dtype_uint8();
      break;
    case ScalarType::Int:
      code = aoti_torch_dtype_int32();
      break;
    case ScalarType::Long:
      code = aoti_torch_dtype_int64();
      break;
    default:
      code = aoti_torch_dtype_float32();
  }
  AtenTensorHandle handle = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK: the headers of torch 2.11 do not have it.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                  sizes.data(),
                                                  strides.data(),
                                                  code,
                                                  aoti_torch_device_type_cpu(),
                                                  0,
                                                  &handle));
  return Tensor(handle);
}

}  // namespace bitnet_ext::cpu
