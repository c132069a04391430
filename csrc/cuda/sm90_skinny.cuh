// What the sm90_skinny_*.cu share: a product of two pieces whose left operand a warpgroup converts in its own
// registers, and whose right operand lies in shared memory.
//
//   sums[64 x 128] += left[64 x 64] * right[128 x 64]^T        fp32 operands, wgmma of fp16
//
// The tall operand is read once, by the warpgroup that multiplies it, straight into the fragments of
// wgmma, so it never passes through shared memory: of the 128 bytes a clock that this gives, products of 128
// columns take 64. Along the contraction the order of numbers is free as long as both operands have the same,
// so each kernel chooses the one in which its loads are vectors.
//
// A chunk of 64 has its own powers of two and its own sums, the small products first, then hi hi: tensor
// cores chop where an addition rounds, and of each chunk only four additions of that size are chopped. Chunks
// are added in fp32 registers.
#pragma once

#include "cuda/common/two_pieces.cuh"
#include "cuda/ptx/wgmma_f16.cuh"

namespace bitnet_ext::cuda {

constexpr int kSkinnyChunk = 64;                          // of the contraction: a row of the swizzle
constexpr int kSkinnyCols = 128;                          // of a product
constexpr int kSkinnyPlaneBytes = kSkinnyCols * 128;      // of one piece of the right operand's chunk
constexpr int kSkinnyChunkBytes = 2 * kSkinnyPlaneBytes;  // hi, then lo
constexpr int kSkinnyPlaneStep = kSkinnyPlaneBytes / 16;  // of a descriptor

// A thread's share of a warpgroup's 64 x 64: of rows g and g + 8 of its warp's 16 (g = lane / 4), the numbers
// at 16 s + 8 r + 2 t + e of the contraction (t = lane % 4), as x[row][4 s + 2 r + e].
using LeftChunk = float[2][16];

// The powers of two of a thread's two rows; the row's 4 lanes get the same.
template <int kCount>
__device__ __forceinline__ Scale row_scale(const float (&x)[kCount]) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = larger_magnitude(top, x[i]);
  return Scale(lanes_max<1, 2>(__float_as_uint(top)));
}

// The pieces of step s of 16 as a fragment of wgmma.
template <int kCount>
__device__ __forceinline__ void split_step(
    const float (&x)[2][kCount], int s, const float (&up)[2], uint32_t (&hi)[4], uint32_t (&lo)[4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Pieces pieces = split(x[row][4 * s + 2 * r], x[row][4 * s + 2 * r + 1], up[row]);
      hi[2 * r + row] = pieces.hi, lo[2 * r + row] = pieces.lo;
    }
  }
  wgmma_operand(hi);
  wgmma_operand(lo);
}

// sums = left * right^T for a chunk in units of both scales; `right` describes its hi plane. While the first
// steps are multiplied the next ones are split; load() stands where `x` is free for the next chunk.
template <typename Load>
__device__ __forceinline__ void multiply_chunk(
    float (&sums)[64], const LeftChunk& x, const float (&up)[2], uint64_t right, Load load) {
  uint32_t hi[4][4], lo[4][4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    split_step(x, s, up, hi[s], lo[s]);
    wgmma_fence();
    wgmma_m64n128_f16(sums, hi[s], right + kSkinnyPlaneStep + 2 * s, s > 0);
    wgmma_m64n128_f16(sums, lo[s], right + 2 * s, 1);
    wgmma_commit();
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) wgmma_m64n128_f16(sums, hi[s], right + 2 * s, 1);
  wgmma_commit();
  load();
  wgmma_wait<0>();
  wgmma_not_before(sums);
}

// total += sums in units of 1. `cols`: the inverse powers of two of the columns.
__device__ __forceinline__ void add_chunk(
    float (&total)[64], const float (&sums)[64], const float (&rows)[2], const float* cols, int lane) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 col = *reinterpret_cast<const float2*>(cols + 8 * j + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[4 * j + i] = fmaf(sums[4 * j + i] * (i % 2 == 0 ? col.x : col.y), rows[i / 2], total[4 * j + i]);
    }
  }
}

// Where 16 bytes, number `piece` of a row of 128, lie in a plane of the right operand.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * 128 + (piece ^ row % 8) * 16;
}

}  // namespace bitnet_ext::cuda
