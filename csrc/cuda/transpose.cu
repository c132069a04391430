// Transposes of 8-bit and of prepacked 2-bit matrices, for the products of the backward. Bound by memory.
//
// transpose_int8: out[k, j] = x[order[j], k]. A block has 128 tokens x 128 columns; a thread 4 tokens x 16
// columns, which it turns as 4 x 4 bytes in registers. A word is then 4 tokens of a column; the words change
// places through shared memory, [128 columns][33 words], where neither side meets a bank twice.
//
// transpose_prepacked: a block has 128 rows x 128 columns, 8 blocks of the layout on either side. The codes
// lie in shared memory as bytes, [row][132]; a lane reads the 4 rows of its byte positions and 4 neighbouring
// columns at a time.
#include "cuda/common/vec.cuh"
#include "cuda/quantize_grad.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;

// Byte j of word r <-> byte r of word j.
__device__ __forceinline__ void transpose_4x4(uint32_t (&m)[4]) {
  const uint32_t low_01 = __byte_perm(m[0], m[1], 0x5140), low_23 = __byte_perm(m[2], m[3], 0x5140);
  const uint32_t high_01 = __byte_perm(m[0], m[1], 0x7362), high_23 = __byte_perm(m[2], m[3], 0x7362);
  m[0] = __byte_perm(low_01, low_23, 0x5410);
  m[1] = __byte_perm(low_01, low_23, 0x7632);
  m[2] = __byte_perm(high_01, high_23, 0x5410);
  m[3] = __byte_perm(high_01, high_23, 0x7632);
}

__global__ void __launch_bounds__(kThreads) transpose_int8_kernel(const int8_t* __restrict__ x,
                                                                  int64_t M,
                                                                  int64_t K,
                                                                  const int32_t* __restrict__ order,
                                                                  int64_t width,
                                                                  uint32_t tiles_wide,
                                                                  bool aligned_in,
                                                                  bool aligned_out,
                                                                  int8_t* __restrict__ out) {
  constexpr int kStride = kTile / 4 + 1;
  __shared__ uint32_t words[kTile * kStride];
  const int64_t first_col = static_cast<int64_t>(blockIdx.x % tiles_wide) * kTile;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x / tiles_wide) * kTile;
  const int part = static_cast<int>(threadIdx.x) % 8, group = static_cast<int>(threadIdx.x) / 8;
  const int64_t col = first_col + part * 16;

  uint4 vectors[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = first_token + group * 4 + i;
    int64_t token = -1;
    if (place < width) token = order != nullptr ? order[place] : place < M ? place : -1;
    vectors[i] = make_uint4(0, 0, 0, 0);
    if (token < 0 || token >= M || col >= K) continue;  // other places of order count as none
    const int8_t* source = x + token * K + col;
    vectors[i] = aligned_in ? *reinterpret_cast<const uint4*>(source) : load_bytes_16(source, K - col);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t m[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      m[i] = w == 0 ? vectors[i].x : w == 1 ? vectors[i].y : w == 2 ? vectors[i].z : vectors[i].w;
    transpose_4x4(m);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[(part * 16 + w * 4 + i) * kStride + group] = m[i];
  }
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int row = pass * 32 + group;
    const uint32_t* source = words + row * kStride + part * 4;
    const uint4 v = make_uint4(source[0], source[1], source[2], source[3]);
    const int64_t k = first_col + row, place = first_token + part * 16;
    if (k >= K || place >= width) continue;
    int8_t* target = out + k * width + place;
    if (aligned_out) {
      *reinterpret_cast<uint4*>(target) = v;
    } else {
      const int8_t* bytes = reinterpret_cast<const int8_t*>(&v);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (place + i < width) target[i] = bytes[i];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) transpose_prepacked_kernel(const uint4* __restrict__ prepacked,
                                                                       int64_t rows_of_blocks,
                                                                       int64_t blocks_wide,
                                                                       int64_t out_rows_of_blocks,
                                                                       int64_t out_blocks_wide,
                                                                       uint32_t tiles_wide,
                                                                       uint4* __restrict__ out) {
  constexpr int kStride = kTile / 4 + 1;  // words
  __shared__ uint32_t codes[kTile * kStride];
  const int64_t tile_k = blockIdx.x % tiles_wide, tile_n = blockIdx.x / tiles_wide;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;

  // Warp w brings block w of the tile's 8, rows 16 w .. 16 w + 15.
  const int64_t row_block = tile_n * 8 + warp;
  uint4 vector = make_uint4(0, 0, 0, 0);
  if (row_block < rows_of_blocks) vector = prepacked[(row_block * blocks_wide + tile_k) * kLanes + lane];
#pragma unroll
  for (int s = 0; s < kStepsPerBlock; ++s) {
    const uint32_t word = s == 0 ? vector.x : s == 1 ? vector.y : s == 2 ? vector.z : vector.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      codes[(warp * 16 + g + 8 * (j % 2)) * kStride + 8 * s + 4 * (j / 2) + t] =
          word << (2 * j) & 0xC0C0C0C0u;
    }
  }
  __syncthreads();

  // And makes block w of the result: its rows are the columns 16 w .. 16 w + 15. A lane reads, for 4 rows of
  // the tile, the column words that hold its rows g and g + 8.
  const int64_t out_row_block = tile_k * 8 + warp;
  if (out_row_block >= out_rows_of_blocks) return;
  const int shift = 8 * (g % 4);
  uint32_t result[kStepsPerBlock];
#pragma unroll
  for (int s = 0; s < kStepsPerBlock; ++s) {
    result[s] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* row = codes + (32 * s + 16 * half + 4 * t + i) * kStride + warp * 4 + g / 4;
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const int j = 2 * half + eight;
          const uint32_t code = row[2 * eight] >> shift & 0xC0u;  // the pair in bits 7 and 6
          result[s] |= code >> (2 * j) << (8 * i);
        }
      }
    }
  }
  out[(out_row_block * out_blocks_wide + tile_n) * kLanes + lane] =
      make_uint4(result[0], result[1], result[2], result[3]);
  __threadfence();
}

}  // namespace

cudaError_t launch_transpose_int8(const int8_t* x,
                                  int64_t M,
                                  int64_t K,
                                  const int32_t* order,
                                  int64_t width,
                                  int8_t* out,
                                  cudaStream_t stream) {
  const int64_t wide = ceil_div(K, kTile), tiles = wide * ceil_div(width, kTile);
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  transpose_int8_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      x,
      M,
      K,
      order,
      width,
      static_cast<uint32_t>(wide),
      K % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0,
      width % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0,
      out);
  return cudaGetLastError();
}

cudaError_t launch_transpose_prepacked(
    const void* prepacked, int64_t N, int64_t K, void* out, cudaStream_t stream) {
  const int64_t wide = block_cols(K), tiles = wide * block_cols(N);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  transpose_prepacked_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      static_cast<const uint4*>(prepacked),
      block_rows(N),
      block_cols(K),
      block_rows(K),
      block_cols(N),
      static_cast<uint32_t>(wide),
      static_cast<uint4*>(out));
  return cudaGetLastError();
}

}  // namespace bitnet_ext::cuda
