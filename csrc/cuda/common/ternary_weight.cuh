// The parts of absmean quantisation that every kernel shares which makes ternary weights: one partial sum of
// |w|, the scale from the partial sums, a code, and a block of the prepacked layout. Whoever uses them gets
// the same bits as quantize_weight_ternary.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "prepacked.h"

namespace bitnet_ext::cuda {

constexpr int kWeightThreads = 256;  // of every block: the order of the sums depends on it

// The sum of |w| over [begin, end), the same bits in every thread; `scratch` as for block_sum. Thread t takes
// the vectors t, t + 256, ... and one sum a place in the vector.
template <typename scalar_t>
__device__ __forceinline__ double abs_partial(
    const scalar_t* weight, int64_t begin, int64_t end, bool aligned, double* scratch) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  double sums[kVec] = {};
#pragma unroll 4
  for (int64_t k = begin + threadIdx.x * kVec; k < end; k += kWeightThreads * kVec) {
    float values[kVec];
    load_floats(weight + k, end - k, aligned, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += static_cast<double>(fabsf(values[i]));
  }
#pragma unroll
  for (int i = 1; i < kVec; ++i) sums[0] += sums[i];
  return block_sum<kWeightThreads>(sums[0], scratch);
}

// max(mean |w|, 1e-5) of a matrix from its partial sums, the same bits in every thread and block.
__device__ __forceinline__ float absmean_scale(
    const double* partials, int num_partials, int64_t N, int64_t K, double* scratch) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < num_partials; i += kWeightThreads) sum += partials[i];
  sum = block_sum<kWeightThreads>(sum, scratch);
  const float mean = static_cast<float>(sum / (static_cast<double>(N) * static_cast<double>(K)));
  float scale = mean < 1e-5f ? 1e-5f : mean;               // keeps a NaN
  if (isinf(scale)) scale = __uint_as_float(0x7fffffffu);  // a weight of Inf is an error too
  return scale;
}

// rint(w / s) = 1 exactly when w / s > 0.5 (a tie rounds to the even 0), and w > 0.5f * s is the same
// condition in fp32 because halving is exact; so no division is needed.
__device__ __forceinline__ int ternary_code(float value, float half) {
  return static_cast<int>(value > half) - static_cast<int>(value < -half);
}

// This lane's 16 bytes of the block of 16 x 128 codes at (first_row, first_col). The four values of a
// register lie in a row of the matrix, so a lane loads 16 times four of them (fp32: 16 bytes, 8 rows x 64
// bytes an instruction). `vectors`: such loads are aligned.
template <typename scalar_t>
__device__ __forceinline__ uint4 prepack_block(const scalar_t* weight,
                                               int64_t N,
                                               int64_t K,
                                               int64_t first_row,
                                               int64_t first_col,
                                               bool vectors,
                                               float half) {
  const int lane = threadIdx.x % kLanes;
  const auto load = [&](int step, int j, bool whole, float(&values)[4]) {
    const int64_t row = first_row + lane / 4 + 8 * (j % 2);
    const int64_t col = first_col + 32 * step + 16 * (j / 2) + lane % 4 * 4;
    // Rows beyond N and columns beyond K are read as 0 and become code 0, as the layout demands.
    load_floats(weight + row * K + col, whole ? 4 : row < N ? K - col : 0, whole, values);
  };
  // The pairs of register j, which has the top bits of each byte for j = 0.
  const auto pairs = [&](int j, const float(&values)[4]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word |= (static_cast<uint32_t>(ternary_code(values[i], half)) & 3u) << (8 * i + 6 - 2 * j);
    }
    return word;
  };
  uint32_t words[kStepsPerBlock] = {};
  if (vectors && first_row + kBlockRows <= N && first_col + kBlockCols <= K) {
    // All loads before the first use: a small matrix waits for memory once, not once a step.
    float values[kStepsPerBlock][4][4];
#pragma unroll
    for (int s = 0; s < kStepsPerBlock; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) load(s, j, true, values[s][j]);
    }
#pragma unroll
    for (int s = 0; s < kStepsPerBlock; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[s] |= pairs(j, values[s][j]);
    }
  } else {
#pragma unroll
    for (int s = 0; s < kStepsPerBlock; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float values[4];
        load(s, j, false, values);
        words[s] |= pairs(j, values);
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace bitnet_ext::cuda
