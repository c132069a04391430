// Causal attention over short sequences, rotary embedding included: one kernel forward, one backward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

// What the kernels accept: T keys and values of a head have to fit shared memory together with a block's own
// rows (84 KB at most, so that devices with 99 KB a block take part).
constexpr bool short_attention_fits(int64_t T, int64_t head_dim) {
  return (head_dim == 32 || head_dim == 64 || head_dim == 128) && T <= 128 && T * head_dim <= 8192;
}

struct ShortAttentionShape {
  DType dtype;
  int64_t B, T;
  int num_heads, num_kv_heads, head_dim;  // num_heads is a multiple of num_kv_heads
  int num_sms;
  bool dependent_launch;
};

// Every pointer to `dtype`: 16-byte aligned.
struct ShortAttentionArgs {
  ShortAttentionShape shape;
  const void* qkv;   // [B, T, (num_heads + 2 num_kv_heads) head_dim]
  const float* cos;  // [T, head_dim], both halves of a row the same
  const float* sin;  // [T, head_dim], the first half of a row the negated second
  void* out;         // [B, T, num_heads head_dim]
  float* lse;        // [B, num_heads, T]: log of the sum of exp of the scaled scores
};

cudaError_t launch_short_attention(const ShortAttentionArgs& args, cudaStream_t stream);

struct ShortAttentionBackwardArgs {
  ShortAttentionShape shape;
  const void* grad_out;  // as out
  const void* qkv;
  const float* cos;
  const float* sin;
  const void* out;
  const float* lse;
  void* grad_qkv;  // as qkv
};

cudaError_t launch_short_attention_backward(const ShortAttentionBackwardArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
