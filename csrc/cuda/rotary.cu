// Rotary embedding of the queries and keys of a stacked product, and its backward.
//
//   y = x cos + roll(x, D / 2) sin                          forward: [q; k; v] -> q, k, or in place; v stays
//   dx = dy cos + roll(dy sin, D / 2)                       backward: dq, dk, dv -> d[q; k; v]
//
// with the tables of rotary_table: both halves of cos are the same, the first half of sin is the negated
// second. Bound by memory: q and k are read and written once (backward: dv too). A thread holds 16 bytes of
// each half of a head, so a pair never leaves it, and takes two heads of a token: it reads its part of the
// tables once for them.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/rotary.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
// Of a thread; 4 take 106 registers, and 67 us instead of 60 (8 x 2048 x 24 x 64 in bf16, H200).
constexpr int kHeads = 2;

// Where the heads of one token begin: queries, keys, values, of which the last may be absent.
template <typename scalar_t>
struct Part {
  scalar_t* data;
  HeadStrides strides;
};
template <typename scalar_t>
struct Parts {
  Part<scalar_t> query, key, value;
};

template <typename scalar_t>
__device__ __forceinline__ scalar_t* head_of(
    const Parts<scalar_t>& parts, int num_heads, int num_kv_heads, int head, int64_t b, int64_t t) {
  Part<scalar_t> part = parts.query;
  if (head >= num_heads) {
    head -= num_heads;
    part = parts.key;
    if (head >= num_kv_heads) {
      head -= num_kv_heads;
      part = parts.value;
    }
  }
  return part.data + b * part.strides.batch + t * part.strides.token + head * part.strides.head;
}

// kSign 1 turns, -1 turns back. Unit: a token, kHeads of its heads and kVec elements of each half of them;
// the heads of a unit are `slots` apart, so that neighbouring threads read neighbouring memory.
template <typename scalar_t, int kVec, int kSign>
__global__ void __launch_bounds__(kThreads, 3) rotary_kernel(const RotaryShape shape,
                                                             const Parts<const scalar_t> from,
                                                             const Parts<scalar_t> to,
                                                             int heads,
                                                             int slots,
                                                             unsigned units) {
  const unsigned half = shape.head_dim / 2, vectors = half / kVec;
  const unsigned unit = blockIdx.x * kThreads + threadIdx.x;  // 32 bits: a 64-bit division is a function call
  wait_for_previous_kernel();
  allow_next_kernel();
  if (unit >= units) return;
  const unsigned per_token = slots * vectors, token = unit / per_token, rest = unit % per_token;
  const int slot = rest / vectors, i = rest % vectors * kVec;
  const int64_t b = token / static_cast<unsigned>(shape.T), t = token % static_cast<unsigned>(shape.T);

  float low[kHeads][kVec], high[kHeads][kVec], c[kVec], s[kVec];
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    const int head = slot + n * slots;
    if (head >= heads) continue;
    const scalar_t* x = head_of(from, shape.num_heads, shape.num_kv_heads, head, b, t) + i;
    load_floats(x, kVec, true, low[n]);
    load_floats(x + half, kVec, true, high[n]);
  }
  load_floats(shape.cos + t * shape.head_dim + half + i, kVec, true, c);
  load_floats(shape.sin + t * shape.head_dim + half + i, kVec, true, s);
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    const int head = slot + n * slots;
    if (head >= heads) continue;
    if (head < shape.num_heads + shape.num_kv_heads) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float x = low[n][e], y = high[n][e], sine = kSign * s[e];
        low[n][e] = fmaf(-y, sine, x * c[e]);
        high[n][e] = fmaf(x, sine, y * c[e]);
      }
    }
    scalar_t* y = head_of(to, shape.num_heads, shape.num_kv_heads, head, b, t) + i;
    store_floats(y, kVec, true, low[n]);
    store_floats(y + half, kVec, true, high[n]);
  }
}

template <typename scalar_t>
bool in_vectors(const Part<scalar_t>& part, int vec) {
  const HeadStrides& s = part.strides;
  return reinterpret_cast<uintptr_t>(part.data) % (vec * sizeof(scalar_t)) == 0 && s.batch % vec == 0 &&
         s.token % vec == 0 && s.head % vec == 0;
}

template <typename scalar_t>
bool in_vectors(const Parts<scalar_t>& parts, int vec) {
  return in_vectors(parts.query, vec) && in_vectors(parts.key, vec) && in_vectors(parts.value, vec);
}

template <int kSign, typename scalar_t>
cudaError_t launch(const RotaryShape& shape,
                   const Parts<const scalar_t>& from,
                   const Parts<scalar_t>& to,
                   int heads,
                   cudaStream_t stream) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  const int half = shape.head_dim / 2;
  bool vectors = half % kVec == 0 && reinterpret_cast<uintptr_t>(shape.cos) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(shape.sin) % 16 == 0;
  vectors = vectors && in_vectors(from, kVec) && in_vectors(to, kVec);
  const int slots = (heads + kHeads - 1) / kHeads;
  const int64_t units = shape.B * shape.T * slots * (vectors ? half / kVec : half);
  const int64_t blocks = ceil_div(units, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (units > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = vectors ? rotary_kernel<scalar_t, kVec, kSign> : rotary_kernel<scalar_t, 1, kSign>;
  return launch_kernel(kernel,
                       static_cast<unsigned>(blocks),
                       kThreads,
                       0,
                       stream,
                       shape.dependent_launch,
                       shape,
                       from,
                       to,
                       heads,
                       slots,
                       static_cast<unsigned>(units));
}

// The parts of a contiguous stacked tensor.
template <typename scalar_t>
Parts<scalar_t> stacked(scalar_t* qkv, const RotaryShape& shape) {
  const int64_t D = shape.head_dim;
  const int64_t pitch = (shape.num_heads + 2 * static_cast<int64_t>(shape.num_kv_heads)) * D;
  const HeadStrides strides = {shape.T * pitch, pitch, D};
  scalar_t* key = qkv + shape.num_heads * D;
  return {{qkv, strides}, {key, strides}, {key + shape.num_kv_heads * D, strides}};
}

HeadStrides contiguous(int64_t T, int64_t heads, int64_t D) {
  return {T * heads * D, heads * D, D};
}

}  // namespace

cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream) {
  const RotaryShape& shape = args.shape;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const Part<scalar_t> query = {static_cast<scalar_t*>(args.query),
                                  contiguous(shape.T, shape.num_heads, shape.head_dim)};
    const Part<scalar_t> key = {static_cast<scalar_t*>(args.key),
                                contiguous(shape.T, shape.num_kv_heads, shape.head_dim)};
    return launch<1, scalar_t>(shape,
                               stacked(static_cast<const scalar_t*>(args.qkv), shape),
                               {query, key, key},  // no value is written
                               shape.num_heads + shape.num_kv_heads,
                               stream);
  });
}

cudaError_t launch_rotary_in_place(const RotaryInPlaceArgs& args, cudaStream_t stream) {
  const RotaryShape& shape = args.shape;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    return launch<1, scalar_t>(shape,
                               stacked(static_cast<const scalar_t*>(args.qkv), shape),
                               stacked(static_cast<scalar_t*>(args.qkv), shape),
                               shape.num_heads + shape.num_kv_heads,
                               stream);
  });
}

cudaError_t launch_rotary_backward(const RotaryBackwardArgs& args, cudaStream_t stream) {
  const RotaryShape& shape = args.shape;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    return launch<-1, scalar_t>(shape,
                                {{static_cast<const scalar_t*>(args.grad_query), args.query_strides},
                                 {static_cast<const scalar_t*>(args.grad_key), args.key_strides},
                                 {static_cast<const scalar_t*>(args.grad_value), args.value_strides}},
                                stacked(static_cast<scalar_t*>(args.grad_qkv), shape),
                                shape.num_heads + 2 * shape.num_kv_heads,
                                stream);
  });
}

}  // namespace bitnet_ext::cuda
