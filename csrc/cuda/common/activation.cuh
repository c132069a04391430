// The activations of a gated product, and their derivatives.
#pragma once

namespace bitnet_ext::cuda {

// relu(g)^2
struct Relu2 {
  static constexpr int kResidentQuarters = 4;  // of the threads that a shape asks for on a multiprocessor

  // relu(NaN) is NaN.
  static __device__ __forceinline__ float relu(float g) {
    float r;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(g));
    return r;
  }
  static __device__ __forceinline__ float apply(float g) {
    const float r = relu(g);
    return __fmul_rn(r, r);
  }
  static __device__ __forceinline__ float derivative(float g) {
    return 2.0f * relu(g);
  }
};

// g / (1 + exp(-g))
struct Silu {
  // The division wants registers, and two tensors under way make up for the threads.
  static constexpr int kResidentQuarters = 3;

  // As PyTorch's CUDA kernel writes it, so that the same compiler makes the same of it: the exact operations
  // of expf, contraction included, are not ours to choose.
  static __device__ __forceinline__ float apply(float g) {
    return g / (1.0f + expf(-g));
  }
  static __device__ __forceinline__ float derivative(float g) {
    const float sigmoid = 1.0f / (1.0f + expf(-g));
    return sigmoid * (1.0f + g * (1.0f - sigmoid));
  }
};

}  // namespace bitnet_ext::cuda
