// Eight neighbours of a row whose element type is known only at run time.
//
// The training kernels read up to four tensors of types that vary on their own (gradients in bfloat16, a
// residual stream in fp32): a template for each combination would be 27 kernels where these switches, the
// same for all threads, are one. A chunk is loaded as bits and unpacked later, so that all loads of a row can
// be under way at once.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/typed_rows.h"
#include "cuda/common/vec.cuh"

namespace bitnet_ext::cuda {

constexpr int kChunk = 8;

__device__ __forceinline__ char* address_of(const TypedRows& rows, int64_t row, int64_t k) {
  return static_cast<char*>(rows.base) + (row * rows.stride + k) * element_bytes(rows.dtype);
}

// Whether chunks can be moved 16 bytes at a time; those of an absent tensor can.
inline bool chunks_aligned(const TypedRows& rows, int64_t K) {
  return K % kChunk == 0 && reinterpret_cast<uintptr_t>(rows.base) % 16 == 0 &&
         rows.stride * element_bytes(rows.dtype) % 16 == 0;
}

__device__ __forceinline__ float element_at(const TypedRows& rows, int64_t row, int64_t k) {
  const char* p = address_of(rows, row, k);
  if (rows.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(p);
  if (rows.dtype == DType::kBFloat16) return to_float(*reinterpret_cast<const __nv_bfloat16*>(p));
  return to_float(*reinterpret_cast<const __half*>(p));
}

// kWhole: K is a multiple of kChunk and rows are aligned. Otherwise the chunk holds fp32, read value by
// value, zero beyond the row's end. kWords is 4 where all tensors are known to be of 16 bits, else 8.
template <bool kWhole, int kWords>
struct Chunk {
  static_assert(kWords == 8 || (kWords == 4 && kWhole));
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const TypedRows& rows, int64_t row, int64_t k, int64_t K) {
    if constexpr (kWhole) {
      const uint4* p = reinterpret_cast<const uint4*>(address_of(rows, row, k));
      const uint4 low = p[0];
      words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
      if constexpr (kWords == 8) {
        if (rows.dtype == DType::kFloat32) {
          const uint4 high = p[1];
          words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        words[i] = k + i < K ? __float_as_uint(element_at(rows, row, k + i)) : 0u;
      }
    }
  }

  // Keeps the compiler from holding the unpacked values of one pass for the next: twice the registers.
  __device__ __forceinline__ void forget_unpacked() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words[i]));
  }

  __device__ __forceinline__ void unpack(DType dtype, float (&out)[kChunk]) const {
    if (!kWhole || (kWords == 8 && dtype == DType::kFloat32)) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[i] = __uint_as_float(words[i % kWords]);
    } else if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
};

// Rounds to nearest even.
template <bool kWhole>
__device__ __forceinline__ void store_chunk(
    const TypedRows& rows, int64_t row, int64_t k, int64_t K, const float (&v)[kChunk]) {
  char* p = address_of(rows, row, k);
  if (rows.dtype == DType::kFloat32) {
    store_floats(reinterpret_cast<float*>(p), K - k, kWhole, v);
  } else if (rows.dtype == DType::kBFloat16) {
    store_floats(reinterpret_cast<__nv_bfloat16*>(p), K - k, kWhole, v);
  } else {
    store_floats(reinterpret_cast<__half*>(p), K - k, kWhole, v);
  }
}

// The values as they would be after a store and a load.
__device__ __forceinline__ void round_to(DType dtype, float (&v)[kChunk]) {
  if (dtype == DType::kFloat32) return;
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) {  // one conversion a pair
    if (dtype == DType::kBFloat16) {
      const uint32_t pair = pack_pair<__nv_bfloat16>(v[i], v[i + 1]);
      v[i] = __uint_as_float(pair << 16);
      v[i + 1] = __uint_as_float(pair & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(__floats2half2_rn(v[i], v[i + 1]));
      v[i] = pair.x;
      v[i + 1] = pair.y;
    }
  }
}
__device__ __forceinline__ float round_to(DType dtype, float v) {
  if (dtype == DType::kFloat32) return v;
  return dtype == DType::kBFloat16 ? to_float(from_float<__nv_bfloat16>(v)) : to_float(from_float<__half>(v));
}

// fp32 [K], such as a gain.
template <bool kWhole>
__device__ __forceinline__ void load_vector(const float* p, int64_t k, int64_t K, float (&out)[kChunk]) {
  load_floats(p + k, K - k, kWhole, out);
}

// --- rows on threads ---------------------------------------------------------------------------------------

// kSlots chunks a thread, kThreadsPerRow threads a row; a block of at least 256 threads has several short
// rows.
template <int kThreadsPerRow_, int kSlots_, bool kWhole_, bool kLoops_ = false, int kWords_ = 8>
struct ChunkShape {
  static constexpr int kThreadsPerRow = kThreadsPerRow_, kSlots = kSlots_, kWords = kWords_;
  static constexpr bool kWhole = kWhole_;
  static constexpr bool kLoops = kLoops_;  // rows may be longer than the slots, and are then read again
  static constexpr int kThreads = kThreadsPerRow < 256 ? 256 : kThreadsPerRow;
  static constexpr int kRows = kThreads / kThreadsPerRow;  // of a block at once
  static constexpr int kWarps = kThreadsPerRow / 32;       // of a row
  static constexpr int64_t kStep = static_cast<int64_t>(kThreadsPerRow) * kChunk;
};

// Calls body(ChunkShape{}). `narrow`: all tensors are of 16 bits, for kernels that have a shape for that.
template <bool kHasNarrow, typename Body>
cudaError_t dispatch_chunk_shape(int64_t K, bool whole, bool narrow, Body&& body) {
  if (!whole) {
    return K <= 1024 ? body(ChunkShape<128, 1, false>{}) : body(ChunkShape<256, 1, false, true>{});
  }
  if (K <= 256) return body(ChunkShape<32, 1, true>{});
  if (K <= 512) return body(ChunkShape<32, 2, true>{});
  if (K <= 1024) return body(ChunkShape<128, 1, true>{});
  if constexpr (kHasNarrow) {
    if (narrow && K <= 2048) return body(ChunkShape<256, 1, true, false, 4>{});
    if (narrow && K <= 4096) return body(ChunkShape<256, 2, true, false, 4>{});
    if (narrow && K <= 8192) return body(ChunkShape<512, 2, true, false, 4>{});
    if (narrow && K <= 16384) return body(ChunkShape<512, 4, true, false, 4>{});
  }
  if (K <= 2048) return body(ChunkShape<256, 1, true>{});
  if (K <= 4096) return body(ChunkShape<256, 2, true>{});
  if (K <= 8192) return body(ChunkShape<512, 2, true>{});
  return body(ChunkShape<256, 2, true, true>{});
}

// The sum over the threads of a row, the same bits in each. `scratch` has two halves of kRows * kWarps, used
// in turns (`turn` 0 or 1), so that one barrier a row is enough.
template <typename Shape>
__device__ __forceinline__ double chunk_row_sum(double v, double* scratch, int turn) {
  v = warp_sum(v);
  if constexpr (Shape::kWarps > 1) {
    double* half = scratch + turn * (Shape::kThreads / 32);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) half[warp] = v;
    __syncthreads();
    const int first = warp / Shape::kWarps * Shape::kWarps;
    v = half[first];
#pragma unroll
    for (int i = 1; i < Shape::kWarps; ++i) v += half[first + i];
  }
  return v;
}

}  // namespace bitnet_ext::cuda
