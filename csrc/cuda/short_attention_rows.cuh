// What the forward and the backward of attention over short sequences share: rows of qkv on their way to
// shared memory, rotated; products of rows; the choice of the kernel.
#pragma once

#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/short_attention.h"

namespace bitnet_ext::cuda {

constexpr int kMaxOwnRows = 16;  // of a block

// Distance of rows in shared memory, in floats: 16-byte reads of the same columns by 8 neighbouring rows hit
// 32 different banks.
template <int kDim>
constexpr int kPitch = kDim + 4;

// Parts of rows that a thread has in flight: the whole of a block's rows at T = 32, D = 64.
template <int kThreads, typename scalar_t>
constexpr int kInFlight =
    static_cast<int>(ceil_div((32 + kThreads / 32) * 32 * static_cast<int>(sizeof(scalar_t)) / 16, kThreads));

// A row to be loaded. `turned` is rotated by its position, `plain` copied; `out`, if not null, is multiplied
// with `plain`.
template <typename scalar_t>
struct Row {
  const scalar_t *turned, *plain, *out;  // null: not there
  int position;
  float *turned_to, *plain_to, *dot_to;
};

// Loads `count` rows, row i being row_of(i), by all threads; no barrier. A thread holds the two parts of a
// row that rotate into each other, and kBatch of these in flight.
template <int kThreads, int kBatch, int kDim, bool kDot, typename scalar_t, typename RowOf>
__device__ __forceinline__ void load_rows(int count,
                                          const float* __restrict__ cos,
                                          const float* __restrict__ sin,
                                          const RowOf& row_of) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  constexpr int kUnits = kDim / 2 / kVec;  // threads of a row, a power of two
  const int total = count * kUnits;
#pragma unroll 1
  for (int base = 0; base < total; base += kThreads * kBatch) {
    float a[kBatch][2][kVec], b[kBatch][2][kVec], c[kBatch][kVec], s[kBatch][kVec],
        o[kDot ? kBatch : 1][2][kVec];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int unit = base + n * kThreads + static_cast<int>(threadIdx.x);
      if (unit >= total) continue;
      const Row<scalar_t> row = row_of(unit / kUnits);
      const int i = unit % kUnits * kVec;
      const int angle = row.position * kDim + kDim / 2 + i;
      load_floats(cos + angle, kVec, true, c[n]);
      load_floats(sin + angle, kVec, true, s[n]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_floats(row.turned + i + half * (kDim / 2), kVec, true, a[n][half]);
        if (row.plain != nullptr) load_floats(row.plain + i + half * (kDim / 2), kVec, true, b[n][half]);
        if constexpr (kDot) {
          if (row.out != nullptr) load_floats(row.out + i + half * (kDim / 2), kVec, true, o[n][half]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int unit = base + n * kThreads + static_cast<int>(threadIdx.x);
      const bool valid = unit < total;
      const Row<scalar_t> row = row_of(valid ? unit / kUnits : 0);
      const int i = unit % kUnits * kVec;
      float dot = 0.0f;
      if (valid) {
        float low[kVec], high[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          low[e] = to_float(from_float<scalar_t>(fmaf(-a[n][1][e], s[n][e], a[n][0][e] * c[n][e])));
          high[e] = to_float(from_float<scalar_t>(fmaf(a[n][0][e], s[n][e], a[n][1][e] * c[n][e])));
        }
        store_floats(row.turned_to + i, kVec, true, low);
        store_floats(row.turned_to + i + kDim / 2, kVec, true, high);
        if (row.plain != nullptr) {
          store_floats(row.plain_to + i, kVec, true, b[n][0]);
          store_floats(row.plain_to + i + kDim / 2, kVec, true, b[n][1]);
        }
        if constexpr (kDot) {
          if (row.out != nullptr) {
#pragma unroll
            for (int e = 0; e < kVec; ++e)
              dot = fmaf(b[n][0][e], o[n][0][e], fmaf(b[n][1][e], o[n][1][e], dot));
          }
        }
      }
      if constexpr (kDot) {
#pragma unroll
        for (int offset = kUnits / 2; offset > 0; offset >>= 1)
          dot += __shfl_xor_sync(kFullWarp, dot, offset);
        if (valid && row.out != nullptr && i == 0) *row.dot_to = dot;
      }
    }
  }
}

// x . y of two rows in shared memory.
template <int kDim>
__device__ __forceinline__ float dot_rows(const float* x, const float* y) {
  float sums[4] = {};
#pragma unroll 8
  for (int i = 0; i < kDim; i += 4) {
    const float4 u = *reinterpret_cast<const float4*>(x + i), v = *reinterpret_cast<const float4*>(y + i);
    sums[0] = fmaf(u.x, v.x, sums[0]);
    sums[1] = fmaf(u.y, v.y, sums[1]);
    sums[2] = fmaf(u.z, v.z, sums[2]);
    sums[3] = fmaf(u.w, v.w, sums[3]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls body(Int<head_dim>, Int<ceil(T / 32)>) for a shape that fits.
template <typename Body>
cudaError_t dispatch_shape(const ShortAttentionShape& shape, Body&& body) {
  if (!short_attention_fits(shape.T, shape.head_dim)) return cudaErrorInvalidValue;
  const auto with_dim = [&](auto dim) {
    if (shape.T <= 32) return body(dim, Int<1>{});
    if (shape.T <= 64) return body(dim, Int<2>{});
    if constexpr (dim.value <= 64) return body(dim, Int<4>{});
    return cudaErrorInvalidValue;
  };
  if (shape.head_dim == 32) return with_dim(Int<32>{});
  if (shape.head_dim == 64) return with_dim(Int<64>{});
  return with_dim(Int<128>{});
}

// Rows a block owns: one a warp while the device has room for the blocks, so that a small call spreads over
// all of it; else 16, so that the rows a block loads serve more of them.
inline int rows_of_block(const ShortAttentionShape& shape, int warps, int64_t heads) {
  const int64_t blocks = shape.B * heads * ceil_div(shape.T, warps);
  return blocks <= 2 * shape.num_sms ? warps : kMaxOwnRows;
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace bitnet_ext::cuda
