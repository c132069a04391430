// What every CUDA operator needs around its kernels: the device, its stream, new tensors and error texts.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "checks.h"
#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline void check_status(const char* op, cudaError_t status) {
  if (status != cudaSuccess) fail(op, "CUDA reports: ", cudaGetErrorString(status));
}

// An attribute of a device, asked for once a device: cudaDeviceGetAttribute is cheap, but an operator of a
// few microseconds should not pay for several.
template <cudaDeviceAttr kAttribute>
int device_attribute(const char* op, int32_t device) {
  constexpr int32_t kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> cache = {};  // plus 1; 0 when not yet known
  const bool cached = device >= 0 && device < kMaxDevices;
  const int known = cached ? cache[static_cast<size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (known > 0) return known - 1;
  int value = 0;
  check_status(op, cudaDeviceGetAttribute(&value, kAttribute, device));
  if (cached) cache[static_cast<size_t>(device)].store(value + 1, std::memory_order_relaxed);
  return value;
}

// The number of multiprocessors of a device, after the check that the kernels run on it at all.
inline int multiprocessors(const char* op, int32_t device) {
  const int major = device_attribute<cudaDevAttrComputeCapabilityMajor>(op, device);
  if (major < 8) {
    cudaDeviceProp properties;
    check_status(op, cudaGetDeviceProperties(&properties, device));
    fail(op,
         "needs a GPU of compute capability 8.0 or newer; got cuda:",
         device,
         " (",
         properties.name,
         ") of compute capability ",
         major,
         ".",
         device_attribute<cudaDevAttrComputeCapabilityMinor>(op, device));
  }
  return device_attribute<cudaDevAttrMultiProcessorCount>(op, device);
}

// Shared memory that one block may use, in bytes.
inline size_t shared_memory_limit(const char* op, int32_t device) {
  return static_cast<size_t>(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(op, device));
}

// Makes the device of an operator's first tensor current for as long as it lives.
class LaunchContext {
 public:
  LaunchContext(const char* op, const Tensor& t)
      : op_(op), device_(device_of(op, t)), guard_(device_), num_sms_(multiprocessors(op, device_)) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device_, &stream) != 0) {
      fail(op, "torch has no current CUDA stream on cuda:", device_);
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const char* op() const {
    return op_;
  }
  int32_t device() const {
    return device_;
  }
  int num_sms() const {
    return num_sms_;
  }
  cudaStream_t stream() const {
    return stream_;
  }
  // Major times 10 plus minor: 90 for an H200.
  int compute_capability() const {
    return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>(op_, device_) +
           device_attribute<cudaDevAttrComputeCapabilityMinor>(op_, device_);
  }
  // Whether a kernel may start before the one ahead of it in the stream has finished (compute capability 9.0
  // and newer; see ptx/dependent_launch.cuh). BITNET_EXT_DEPENDENT_LAUNCH=0 turns it off, read at each call:
  // to time a kernel by itself, or to find out whether an error comes from the overlap.
  // Nor may it where a captured stream has waited for another one: the kernel then follows several, and a
  // graph is only told that it may overlap one.
  bool dependent_launch() const {
    const char* setting = std::getenv("BITNET_EXT_DEPENDENT_LAUNCH");
    const bool off = setting != nullptr && setting[0] == '0' && setting[1] == '\0';
    return !off && compute_capability() >= 90 && !follows_several();
  }

  // Throws when a launch failed.
  void check(cudaError_t status) const {
    check_status(op_, status);
  }

  // A contiguous input on this device.
  void check_input(const char* arg, const Tensor& t) const {
    check_cuda(op_, arg, t, device_);
    check_contiguous(op_, arg, t);
  }
  void check_input(const char* arg, const Tensor& t, ScalarType dtype) const {
    check_cuda(op_, arg, t, device_);
    check_dtype(op_, arg, t, dtype);
    check_contiguous(op_, arg, t);
  }
  void check_float_input(const char* arg, const Tensor& t) const {
    check_cuda(op_, arg, t, device_);
    check_float(op_, arg, t);
    check_contiguous(op_, arg, t);
  }
  // The data of an fp32 vector of `size` elements, or null.
  const float* optional_vector(const char* arg, const std::optional<Tensor>& t, int64_t size) const {
    if (!t.has_value()) return nullptr;
    check_input(arg, *t, ScalarType::Float);
    check_vector(op_, arg, *t, size);
    return static_cast<const float*>(t->const_data_ptr());
  }

  // An uninitialised contiguous tensor on this device. The shim is called directly: torch::stable::empty goes
  // through the boxed dispatcher, which takes longer than a kernel of one token.
  Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    AtenTensorHandle handle = nullptr;
    const auto status = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                 sizes.data(),
                                                 strides.data(),
                                                 dtype_code(dtype),
                                                 aoti_torch_device_type_cuda(),
                                                 device_,
                                                 &handle);
    if (status != 0) {
      fail(op_, "cannot allocate ", dtype_name(dtype), " ", shape_text(sizes), " on cuda:", device_);
    }
    return Tensor(handle);
  }

 private:
  static int32_t device_of(const char* op, const Tensor& t) {
    if (!t.is_cuda())
      fail(op, "the first tensor must be on a CUDA device like the others; got another device");
    return t.get_device_index();
  }

  // Whether this stream is being captured and its next kernel has more than one predecessor.
  bool follows_several() const {
    if (stream_ == nullptr) return false;  // the legacy stream cannot be captured
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    size_t predecessors = 0;
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream_, &status, nullptr, nullptr, nullptr, nullptr, &predecessors));
#else
    check(cudaStreamGetCaptureInfo_v3(stream_, &status, nullptr, nullptr, nullptr, nullptr, &predecessors));
#endif
    return status == cudaStreamCaptureStatusActive && predecessors > 1;
  }

  static int32_t dtype_code(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::BFloat16:
        return aoti_torch_dtype_bfloat16();
      case ScalarType::Half:
        return aoti_torch_dtype_float16();
      case ScalarType::Double:
        return aoti_torch_dtype_float64();
      case ScalarType::Char:
        return aoti_torch_dtype_int8();
      case ScalarType::Byte:
        return aoti_torch_dtype_uint8();
      case ScalarType::Int:
        return aoti_torch_dtype_int32();
      case ScalarType::Long:
        return aoti_torch_dtype_int64();
      default:
        return aoti_torch_dtype_float32();
    }
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  int num_sms_;
  cudaStream_t stream_ = nullptr;
};

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace bitnet_ext::cuda
