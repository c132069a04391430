// An output gradient g [M, N] in 8 bits, twice, rounded at random:
//
//   by_row[m, n]    = round(g[m, n] weight_scale[n] / row_scale[m])            for dL/dx = by_row * W
//   by_column[n, j] = round(g[m, n] act_scale[m] / unit(j, n)), m = order[j]   for dL/dW = by_column * x
//
// row_scale is the row's largest magnitude / 126.999; int8_gradient.h has the units of by_column. round(v) is
// floor(v + u) with u uniform in multiples of 2^-16: the mean over the seeds is v. u comes from a hash of
// (seed, m, n), 16 bits for each of the two roundings, so neither the launch nor the order matters.
//
// Four kernels, each launched while the one before it ends. The first clears the maxima. Statistics: reads g
// once; maxima of rows and columns meet as integers (atomicMax on the bits of magnitudes, whose order is that
// of the numbers; NaN is above all), so their order does not matter. Order: order_tokens.cu. Quantisation:
// reads g again, 128 places x 64 columns a block, in the order of places; a thread has 4 tokens x 8 columns,
// packs the 4 tokens of a column into a word and sends the words through shared memory, [64 columns][33
// words], so that both results leave in whole sectors.
//
// Bound: memory, 2 + 2 bytes read and 1 + 1 written per value; the hash (9 instructions a value) just fits
// beside it.
#include <type_traits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/int8_gradient.h"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/quantize_grad.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 8;  // columns of a thread

__device__ __forceinline__ uint32_t magnitude_bits(float v) {
  return __float_as_uint(v) & 0x7fffffffu;
}

// The weight scale of column n; 0 beyond the last.
__device__ __forceinline__ float scale_of_column(const QuantizeGradArgs& args, int64_t n) {
  if (n >= args.N) return 0.0f;
  if (args.scale_per_row) return args.weight_scale[n];
  int segment = 0;
  while (n >= args.segment_end[segment]) ++segment;
  return args.weight_scale[segment];
}

// kVec neighbours as they lie in memory: unpacked, the 4 rows of a thread would take 32 registers.
template <typename T, bool kAligned>
struct RawValues {
  static constexpr int kWords = kAligned ? kVec * static_cast<int>(sizeof(T)) / 16 : kVec / 4;
  using element_t = std::conditional_t<kAligned, T, float>;
  uint4 words[kWords];

  __device__ __forceinline__ void load(const T* p, int64_t valid) {
    if constexpr (kAligned) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        words[w] = valid > 0 ? reinterpret_cast<const uint4*>(p)[w] : make_uint4(0, 0, 0, 0);
      }
    } else {
      float values[kVec];
      load_floats<kVec>(p, valid, false, values);
      memcpy(words, values, sizeof(words));
    }
  }
  __device__ __forceinline__ void unpack(float (&out)[kVec]) const {
    if constexpr (std::is_same_v<element_t, __nv_bfloat16>) {  // an instruction a value; to_float takes 1.5
      const auto* pairs = reinterpret_cast<const uint32_t*>(words);
#pragma unroll
      for (int p = 0; p < kVec / 2; ++p) {
        out[2 * p] = __uint_as_float(pairs[p] << 16);
        out[2 * p + 1] = __uint_as_float(pairs[p] & 0xffff0000u);
      }
    } else {
      const auto* elements = reinterpret_cast<const element_t*>(words);
#pragma unroll
      for (int c = 0; c < kVec; ++c) out[c] = to_float(elements[c]);
    }
  }
};

// --- statistics -----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) clear_maxima_kernel(const QuantizeGradArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < 2 * args.M) args.row_max[i] = 0;
  if (args.by_column != nullptr && i < args.N) args.column_max[i] = 0.0f;
}

constexpr int kStatsCols = 512, kStatsRows = 64, kStatsLanes = kStatsCols / kVec;

// Two NaN-propagating maxima of magnitudes; the sign of either argument does not count.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
  return larger;
}

// kAligned: N is a multiple of kVec and rows begin at multiples of 16 bytes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kAligned ? 4 : 3)
    gradient_maxima_kernel(const QuantizeGradArgs args, uint32_t tiles_wide) {
  constexpr int kGroups = kThreads / kStatsLanes, kRowsEach = kStatsRows / kGroups;
  // Rows whose loads are under way together: with one the kernel took four times its memory's time.
  constexpr int kAtOnce = sizeof(T) == 4 ? 2 : 4;
  __shared__ uint32_t row_max[kStatsRows], token_max[kStatsRows], column_max[kStatsCols];
  __shared__ float act_scales[kStatsRows];
  const T* grad = static_cast<const T*>(args.grad);
  const int64_t first_col = static_cast<int64_t>(blockIdx.x % tiles_wide) * kStatsCols;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / tiles_wide) * kStatsRows;
  const int lane = static_cast<int>(threadIdx.x) % kStatsLanes;
  const int group = static_cast<int>(threadIdx.x) / kStatsLanes;
  const int64_t col = first_col + lane * kVec;
  const bool columns = args.by_column != nullptr;
  // Rows of this thread: group + r * kGroups, r < rows.
  const int rows =
      static_cast<int>(min(static_cast<int64_t>(kRowsEach),
                           max(int64_t{0}, (args.M - first_row - group + kGroups - 1) / kGroups)));
  const T* next = grad + (first_row + group) * args.N + col;
  const int64_t step = kGroups * args.N, valid = args.N - col;
  RawValues<T, kAligned> raw[kAtOnce];
  const auto load = [&](int r) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) raw[i].load(next + i * step, r + i < rows ? valid : 0);
    next += kAtOnce * step;
  };
  wait_for_previous_kernel();
  allow_next_kernel();
  load(0);

  for (int i = threadIdx.x; i < kStatsCols; i += kThreads) column_max[i] = 0;
  if (threadIdx.x < kStatsRows) {
    row_max[threadIdx.x] = token_max[threadIdx.x] = 0;
    const int64_t row = first_row + threadIdx.x;
    act_scales[threadIdx.x] = columns && row < args.M ? args.act_scale[row] : 0.0f;
  }
  float scales[kVec];
  bool one_scale = true;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    scales[i] = scale_of_column(args, col + i);
    one_scale &= scales[i] == scales[0];
  }
  // Every lane takes part, also one that has met two scales: behind && in the next line its warp never ended.
  const float scale_of_warp = __shfl_sync(kFullWarp, scales[0], 0);
  one_scale = __all_sync(kFullWarp, one_scale && scales[0] == scale_of_warp);
  __syncthreads();

  float of_column[kVec] = {};
  for (int r = 0; r < rows; r += kAtOnce) {  // the same in the whole warp
    if (r > 0) load(r);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (r + i >= rows) break;
      const int in_tile = (r + i) * kGroups + group;
      const float act_scale = act_scales[in_tile];
      float g[kVec];
      raw[i].unpack(g);
      float largest = g[0];
#pragma unroll
      for (int c = 1; c < kVec; ++c) largest = larger_magnitude(largest, g[c]);
#pragma unroll
      for (int c = 0; c < kVec; ++c) of_column[c] = larger_magnitude(of_column[c], g[c] * act_scale);
      // Rounded products are in the order of their factors, so the largest of them is the largest's.
      const uint32_t top = __reduce_max_sync(kFullWarp, magnitude_bits(largest));
      uint32_t of_row = magnitude_bits(__uint_as_float(top) * scales[0]);
      if (!one_scale) {
        of_row = 0;
#pragma unroll
        for (int c = 0; c < kVec; ++c) of_row = max(of_row, magnitude_bits(g[c] * scales[c]));
        of_row = __reduce_max_sync(kFullWarp, of_row);
      }
      if (threadIdx.x % 32 == 0) {
        atomicMax(row_max + in_tile, of_row);
        atomicMax(token_max + in_tile, magnitude_bits(__uint_as_float(top) * act_scale));
      }
    }
  }
  if (columns) {
    // Column c of lane l at c * kStatsLanes + l: neighbouring lanes in neighbouring banks.
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      atomicMax(column_max + c * kStatsLanes + lane, magnitude_bits(of_column[c]));
    }
  }
  __syncthreads();
  if (threadIdx.x < kStatsRows && first_row + threadIdx.x < args.M) {
    atomicMax(args.row_max + first_row + threadIdx.x, row_max[threadIdx.x]);
    if (columns) atomicMax(args.token_max + first_row + threadIdx.x, token_max[threadIdx.x]);
  }
  if (columns) {
    for (int i = threadIdx.x; i < kStatsCols && first_col + i < args.N; i += kThreads) {
      atomicMax(reinterpret_cast<uint32_t*>(args.column_max) + first_col + i,
                column_max[i % kVec * kStatsLanes + i / kVec]);
    }
  }
}

// --- quantisation ---------------------------------------------------------------------------------------

constexpr int kTileTokens = 128, kTileCols = 64, kTokensEach = 4;

// 64 bits for a row (the finaliser of splitmix64), 32 for each of its values.
__device__ __forceinline__ uint64_t row_key(uint64_t seed, uint64_t m) {
  uint64_t x = seed + (m + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}

// The two random numbers of a value, 1 + u with u in multiples of 2^-16: of the word x ^ x >> 16 the upper
// half (which is x's) is the row's u, the lower one the column's. Under the bytes 0x4300 a half is the float
// 128 + u, from which 127 goes exactly: shifts and masks that put it under an exponent of 0 would be 4
// instructions more for the integer unit, which takes one of them in two clocks and bounds the kernel beside
// memory.
struct OneAndU {
  float row, column;
};

__device__ __forceinline__ OneAndU random_pair(uint64_t key, uint32_t n) {
  uint32_t x = n * 0x9E3779B1u + static_cast<uint32_t>(key);
  x ^= x >> 15;
  x = x * 0x85EBCA6Bu + static_cast<uint32_t>(key >> 32);
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  const uint32_t upper = __byte_perm(x, 0x4300, 0x5432), lower = upper ^ (x & 0xffffu);
  return {__uint_as_float(upper) - 127.0f, __uint_as_float(lower) - 127.0f};
}

// floor(value * factor + u) as the low byte of the result. Adding 1.5 * 2^23 - 1, rounded down, leaves the
// integer in the low bits: no conversions, of which a multiprocessor makes 16 a clock.
__device__ __forceinline__ uint32_t round_at_random(float value, float factor, float one_and_u) {
  return __float_as_uint(__fadd_rd(__fmaf_rn(value, factor, one_and_u), 12582911.0f));
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// 1 / scale; 0 for a scale that is 0, too small to invert, or NaN.
__device__ __forceinline__ float inverse(float scale) {
  return scale > 1e-36f ? 1.0f / scale : 0.0f;
}

struct __align__(16) TokenFacts {
  uint64_t key;
  float to_row, act_scale;
};

// kAligned: N is a multiple of kVec and rows begin at multiples of 16 bytes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kAligned ? 4 : 3)
    quantize_grad_kernel(const QuantizeGradArgs args, uint32_t tiles_wide) {
  constexpr int kStride = kTileTokens / kTokensEach + 1;
  __shared__ uint32_t words[kTileCols * kStride];
  __shared__ TokenFacts facts[kTileTokens];
  __shared__ __align__(16) float column_scale[kTileCols], to_unit[kTileCols];
  const T* grad = static_cast<const T*>(args.grad);
  const int64_t first_col = static_cast<int64_t>(blockIdx.x % tiles_wide) * kTileCols;
  const int64_t first_place = static_cast<int64_t>(blockIdx.x / tiles_wide) * kTileTokens;
  const int part = static_cast<int>(threadIdx.x) % 8, group = static_cast<int>(threadIdx.x) / 8;
  const int64_t col = first_col + part * kVec, width = padded_tokens(args.M);
  const bool rows = args.by_row != nullptr, columns = args.by_column != nullptr;
  const auto token_at = [&](int in_tile) {
    const int64_t place = first_place + in_tile;
    return columns ? args.order[place] : place < args.M ? static_cast<int>(place) : -1;
  };

  wait_for_previous_kernel();
  allow_next_kernel();
  int token[kTokensEach];
  RawValues<T, kAligned> raw[kTokensEach];
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) token[i] = token_at(group * kTokensEach + i);
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    raw[i].load(grad + token[i] * args.N + col, token[i] < 0 ? 0 : args.N - col);
  }
  // What belongs to a token or a column is found once a block, while those loads are under way.
  if (threadIdx.x < kTileTokens) {
    const int m = token_at(static_cast<int>(threadIdx.x));
    TokenFacts mine = {};
    if (m >= 0) {
      mine.key = row_key(static_cast<uint64_t>(*args.seed), static_cast<uint64_t>(m));
      if (columns) mine.act_scale = args.act_scale[m];
      if (rows) {
        const float largest = __uint_as_float(args.row_max[m]);
        const float row_scale = largest < __uint_as_float(0x7f800000u) ? largest * kInverseLargestCode
                                                                       : __uint_as_float(0x7fffffffu);
        mine.to_row = inverse(row_scale);
        if (first_col == 0) args.row_scale[m] = row_scale;
      }
    }
    facts[threadIdx.x] = mine;
  } else if (threadIdx.x < kTileTokens + kTileCols) {
    const int in_tile = static_cast<int>(threadIdx.x) - kTileTokens;
    const int64_t n = first_col + in_tile;
    column_scale[in_tile] = scale_of_column(args, n);
    if (columns) {
      const float largest = n < args.N ? args.column_max[n] : 0.0f;
      to_unit[in_tile] =
          inverse(column_bound(args.stage_bound[first_place / kStageTokens], largest) * kInverseLargestCode);
    }
  }
  __syncthreads();

  float scales[kVec], factors[kVec];
#pragma unroll
  for (int c = 0; c < kVec; ++c) {
    scales[c] = column_scale[part * kVec + c];
    factors[c] = columns ? to_unit[part * kVec + c] : 0.0f;
  }
  uint32_t of_column[kVec] = {};
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    const int64_t m = token[i];
    if (m < 0) continue;
    const TokenFacts mine = facts[group * kTokensEach + i];
    float g[kVec];
    raw[i].unpack(g);
    uint32_t of_row[kVec];
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      const OneAndU random = random_pair(mine.key, static_cast<uint32_t>(col) + c);
      of_row[c] = round_at_random(g[c] * scales[c], mine.to_row, random.row);
      const uint32_t byte = round_at_random(g[c] * mine.act_scale, factors[c], random.column);
      constexpr uint32_t kPut[] = {0x3214, 0x3240, 0x3410, 0x4210};  // into byte i
      of_column[c] = __byte_perm(of_column[c], byte, kPut[i]);
    }
    if (!rows) continue;
    const uint2 eight = make_uint2(low_bytes(of_row[0], of_row[1], of_row[2], of_row[3]),
                                   low_bytes(of_row[4], of_row[5], of_row[6], of_row[7]));
    int8_t* target = args.by_row + m * args.N + col;
    if constexpr (kAligned) {
      if (col < args.N) *reinterpret_cast<uint2*>(target) = eight;
    } else {
      const int8_t* bytes = reinterpret_cast<const int8_t*>(&eight);
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        if (col + c < args.N) target[c] = bytes[c];
      }
    }
  }
  if (!columns) return;
#pragma unroll
  for (int c = 0; c < kVec; ++c) words[(part * kVec + c) * kStride + group] = of_column[c];
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int row = pass * 32 + group;
    const uint32_t* source = words + row * kStride + part * 4;
    if (first_col + row >= args.N) break;
    *reinterpret_cast<uint4*>(args.by_column + (first_col + row) * width + first_place + part * 16) =
        make_uint4(source[0], source[1], source[2], source[3]);
  }
}

}  // namespace

cudaError_t launch_quantize_grad(const QuantizeGradArgs& args, bool dependent, cudaStream_t stream) {
  const int64_t width = padded_tokens(args.M);
  if (args.M == 0) return cudaSuccess;
  const int64_t stats_wide = ceil_div(args.N, kStatsCols), tiles_wide = ceil_div(args.N, kTileCols);
  if (stats_wide * ceil_div(args.M, kStatsRows) > INT32_MAX ||
      tiles_wide * (width / kTileTokens) > INT32_MAX || width > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const bool columns = args.by_column != nullptr;
  const int64_t to_clear = columns && args.N > 2 * args.M ? args.N : 2 * args.M;
  const auto launch = [&](auto kernel, int64_t blocks, int threads, auto... more) {
    return launch_kernel(kernel, static_cast<unsigned>(blocks), threads, 0, stream, dependent, args, more...);
  };
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Whole vectors in every row, at multiples of 16 bytes
    const bool aligned = args.N % kVec == 0 && reinterpret_cast<uintptr_t>(args.grad) % 16 == 0;
    cudaError_t status = launch(clear_maxima_kernel, ceil_div(to_clear, kThreads), kThreads);
    if (status != cudaSuccess) return status;
    status = launch(aligned ? gradient_maxima_kernel<T, true> : gradient_maxima_kernel<T, false>,
                    stats_wide * ceil_div(args.M, kStatsRows),
                    kThreads,
                    static_cast<uint32_t>(stats_wide));
    if (status == cudaSuccess && columns) status = launch_order_tokens(args, dependent, stream);
    if (status != cudaSuccess) return status;
    return launch(aligned ? quantize_grad_kernel<T, true> : quantize_grad_kernel<T, false>,
                  tiles_wide * (width / kTileTokens),
                  kThreads,
                  static_cast<uint32_t>(tiles_wide));
  });
}

}  // namespace bitnet_ext::cuda
