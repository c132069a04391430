// Rotary embedding between a stacked product and an attention kernel, and its backward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// Elements between neighbours in each dimension of a [B, T, heads, D] tensor; D itself is contiguous.
struct HeadStrides {
  int64_t batch, token, head;
};

struct RotaryShape {
  DType dtype;
  int64_t B, T;
  int num_heads, num_kv_heads, head_dim;  // head_dim is even
  const float* cos;                       // [T, head_dim], both halves of a row the same
  const float* sin;                       // [T, head_dim], the first half of a row the negated second
  bool dependent_launch;
};

struct RotaryArgs {
  RotaryShape shape;
  const void* qkv;  // [B, T, (num_heads + 2 num_kv_heads) head_dim]
  void* query;      // [B, T, num_heads, head_dim]
  void* key;        // [B, T, num_kv_heads, head_dim]
};

cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream);

struct RotaryInPlaceArgs {
  RotaryShape shape;
  void* qkv;  // as above; queries and keys are overwritten
};

cudaError_t launch_rotary_in_place(const RotaryInPlaceArgs& args, cudaStream_t stream);

struct RotaryBackwardArgs {
  RotaryShape shape;
  const void* grad_query;
  HeadStrides query_strides;
  const void* grad_key;
  HeadStrides key_strides;
  const void* grad_value;
  HeadStrides value_strides;
  void* grad_qkv;  // [B, T, (num_heads + 2 num_kv_heads) head_dim]
};

cudaError_t launch_rotary_backward(const RotaryBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
