// Both gradients of a ternary layer for few tokens, in one launch, with the accuracy of fp32:
//
//   grad_x[m, k]      = sum_n grad_y[m, n] * weight_scale(n) * t[n, k]            t: prepacked codes
//   grad_weight[n, k] = sum_m grad_y[m, n] * act_scale[m] * x_i8[m, k]
//
// Codes and int8 activations are exact in bf16. The scaled gradient is cut into 3 pieces of 8 bits (2 when it
// came in 16 bits itself), so 3 (2) products of bf16 tensor cores give all of its 24 (16) bits. Each step of
// 16 is summed from zero and added to the sum so far in fp32: the tensor cores chop where an addition rounds,
// and over 1,024 terms that would show.
//
// For 128 tokens and a layer of 768 x 256 the products are 0.3 us of the tensor cores; what counts is the way
// to memory and back. So nothing is staged: a block has a tile of one of the gradients, its 8 warps take
// steps of the contraction in turn and load their fragments straight into registers, several steps ahead, and
// the tile's 8 sums meet in shared memory once, in the order of the warps; two blocks of a cluster may share
// a tile of grad_x. The order in which a step's 16 terms and a tile's rows and columns sit in the fragments
// is free, and chosen so that every lane reads neighbours:
//
//   grad_x, 16 x 64: a step is a row of prepacked blocks. A 32-bit word of the layout has 8 columns of the
//     rows r and r + 8; lane (g, t) reads the words of r = 2 t and 2 t + 1, and grad_y at those 4 rows' n.
//     The top two bits of a bf16 are a code times 2, so a permutation of bytes and a mask decode two.
//   grad_weight, 32 x 32: lane (g, t) reads tokens 4 t .. 4 t + 3 of a step: 4 neighbours n of grad_y and 4
//     of x_i8, which become bf16 by two masks and a subtraction a pair.
#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/mma_float.cuh"
#include "cuda/small_grad.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 16;  // of the contraction
// Shared memory: a tile's sums of each warp, and the block's for the others of its cluster.
constexpr int kExchange = kWarps * kThreads;
constexpr int kSharedBytes = (kExchange + kThreads) * 16;

// --- operands ----------------------------------------------------------------------------------------------

// kCount neighbours of T as they were loaded: conversions wait until the step is due.
template <typename T, int kCount>
struct Raw {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  uint32_t words[kWords];

  // The first `valid` of them, zeros beyond. kWhole: all or none, from an aligned address.
  template <bool kWhole>
  __device__ __forceinline__ void load(const T* p, int valid) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if constexpr (kWhole) {
      if (valid > 0) {
        using raw_t = typename RawBits<kBytes>::type;
        const raw_t raw = *reinterpret_cast<const raw_t*>(p);
        memcpy(words, &raw, kBytes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= valid) continue;
        if constexpr (sizeof(T) == 4) {
          words[i] = *reinterpret_cast<const uint32_t*>(p + i);
        } else if constexpr (sizeof(T) == 2) {
          words[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p + i)) << (16 * (i % 2));
        } else {
          words[i / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(p + i)) << (8 * (i % 4));
        }
      }
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)))));
    }
  }
};

// The pieces of v, each in the upper half of a word; what lies below is not part of it.
template <int kPieces>
__device__ __forceinline__ void split(float v, uint32_t (&piece)[kPieces]) {
  // Inf - Inf would spread NaN where PyTorch has Inf; the remainder of a finite number is below 2^120.
  constexpr float kAboveAllRemainders = 0x1p121f;
  piece[0] = __float_as_uint(v);
#pragma unroll
  for (int p = 1; p < kPieces; ++p) {
    v -= __uint_as_float(piece[p - 1] & 0xffff0000u);
    if (p == 1) v = fminf(v, kAboveAllRemainders);
    piece[p] = __float_as_uint(v);
  }
}

// Register `index` of the fragments of all pieces: `low` and `high` are neighbours in the contraction.
template <int kPieces>
__device__ __forceinline__ void split_pair(float low, float high, int index, uint32_t (&a)[kPieces][4]) {
  uint32_t of_low[kPieces], of_high[kPieces];
  split(low, of_low);
  split(high, of_high);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) a[p][index] = __byte_perm(of_low[p], of_high[p], 0x7632);
}

// Byte `i` of two words, as int8, to a pair of bf16: (x & 127) + 128 and (x & 128) + 128 are exact.
__device__ __forceinline__ uint32_t bf16_pair(uint32_t low, uint32_t high, int i) {
  const uint32_t bytes = __byte_perm(low, high, static_cast<uint32_t>(i | (4 + i) << 8));
  constexpr uint32_t k128 = 0x43004300u;
  const uint32_t magnitude = (bytes & 0x007f007fu) | k128, sign = (bytes & 0x00800080u) | k128;
  const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                      *reinterpret_cast<const __nv_bfloat162*>(&sign));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sum += a * b, the smallest pieces first.
template <int kPieces>
__device__ __forceinline__ void multiply(float (&sum)[4],
                                         const uint32_t (&a)[kPieces][4],
                                         uint32_t b0,
                                         uint32_t b1) {
  float step[4] = {};
#pragma unroll
  for (int p = kPieces - 1; p >= 0; --p) mma_m16n8k16_bf16(step, a[p], b0, b1);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += step[i];
}

// --- the two gradients -------------------------------------------------------------------------------------
//
// A task has rows x columns of its result, knows how to load a step and how to add it, and hands out its sums
// in runs: run r of a lane is kRun neighbours of a row.

template <typename T, bool kWhole>
struct InputTask {
  static constexpr int kRows = 16, kCols = 64;
  static constexpr int kDepth = 2;
  static constexpr int kPieces = sizeof(T) == 4 ? 3 : 2;
  static constexpr int kRun = 4, kRuns = 8;

  struct Step {
    Raw<T, 2> grad[2][2];  // [row g, g + 8][n = 2 t, 2 t + 8]
    uint32_t codes[2];     // r = 2 t, 2 t + 1
    float scale;
  };

  const SmallGradArgs& args;
  const T* grad;
  const uint32_t* codes;
  int64_t codes_stride;
  int first_m, first_k, num_steps;
  int segment = 0;
  float acc[2][4][4] = {};  // [half of a step][i][fragment]

  __device__ __forceinline__ InputTask(const SmallGradArgs& a, int tile) : args(a) {
    const int tiles_k = (a.K + kCols - 1) / kCols;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    first_m = tile / tiles_k * kRows, first_k = tile % tiles_k * kCols;
    num_steps = (a.N + kStep - 1) / kStep;
    grad = static_cast<const T*>(a.grad_y) + static_cast<int64_t>(first_m + g) * a.N + 2 * t;
    // Word s of lane 4 r + t' of the layout: columns 4 t' of step s. Here t' = g % 4, s = first + g / 4.
    codes_stride = block_cols(a.K) * (kTernaryBlockBytes / 4);
    codes = a.weight + first_k / kBlockCols * (kTernaryBlockBytes / 4) + (8 * t + g % 4) * kStepsPerBlock +
            first_k % kBlockCols / 32 + g / 4;
  }

  __device__ __forceinline__ void load(int index, Step& step) {
    const int first_n = index * kStep, n = first_n + threadIdx.x % 4 * 2;
    const int m = first_m + threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row = grad + static_cast<int64_t>(8 * half) * args.N + first_n;
      const int rows_left = m + 8 * half < args.M ? args.N - n : 0;
      step.grad[half][0].template load<kWhole>(row, rows_left);
      step.grad[half][1].template load<kWhole>(row + 8, rows_left - 8);
    }
    const uint32_t* words = codes + index * codes_stride;
    step.codes[0] = words[0];
    step.codes[1] = words[4 * kStepsPerBlock];
    while (first_n >= args.segment_end[segment]) ++segment;
    step.scale = args.weight_scale[segment];
  }

  __device__ __forceinline__ void add(const Step& step) {
    uint32_t a[kPieces][4];
    const float scale = 0.5f * step.scale;  // codes come times 2
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        split_pair(step.grad[half][0][r] * scale, step.grad[half][1][r] * scale, 2 * r + half, a);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t b[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t upper = step.codes[r] << (4 * h), lower = step.codes[r] << (4 * h + 2);
          b[r] = __byte_perm(upper, lower, static_cast<uint32_t>(i << 4 | (4 + i) << 12)) & 0xC000C000u;
        }
        multiply(acc[h][i], a, b[0], b[1]);
      }
    }
  }

  // Run [half of the rows][half of a step][column parity]: the 4 columns i.
  __device__ __forceinline__ float value(int run, int i) const {
    return acc[run / 2 % 2][i][run / 4 * 2 + run % 2];
  }
  __device__ __forceinline__ void store(int run, const float (&values)[kRun]) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const int m = first_m + lane / 4 + run / 4 * 8;
    const int k = first_k + t / 2 * 32 + run / 2 % 2 * 16 + t % 2 * 8 + run % 2 * 4;
    if (m >= args.M) return;
    T* out = static_cast<T*>(args.grad_x) + static_cast<int64_t>(m) * args.K + k;
    store_floats<kRun>(out, args.K - k, kWhole, values);
  }
};

template <typename T, bool kWhole, int kCols_>
struct WeightTask {
  static constexpr int kRows = 32, kCols = kCols_;
  static constexpr int kDepth = 1;
  static constexpr int kPieces = sizeof(T) == 4 ? 3 : 2;
  static constexpr int kRun = kCols / 8, kRuns = 8;

  struct Step {
    Raw<T, 4> grad[4];       // [token 4 t + q][n = 4 g ..]
    Raw<int8_t, kRun> x[4];  // [token 4 t + q][k = kRun g ..]
    float scale[4];
  };

  const SmallGradArgs& args;
  const T* grad;
  const int8_t* x;
  int first_n, first_k, num_steps;
  float acc[2][kRun][4] = {};  // [pair of n][column][fragment]

  __device__ __forceinline__ WeightTask(const SmallGradArgs& a, int tile) : args(a) {
    const int tiles_k = (a.K + kCols - 1) / kCols;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    first_n = tile / tiles_k * kRows, first_k = tile % tiles_k * kCols;
    num_steps = (a.M + kStep - 1) / kStep;
    grad = static_cast<const T*>(a.grad_y) + static_cast<int64_t>(4 * t) * a.N + first_n + 4 * g;
    x = a.x_i8 + static_cast<int64_t>(4 * t) * a.K + first_k + kRun * g;
  }

  __device__ __forceinline__ void load(int index, Step& step) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const int first_m = index * kStep, m = first_m + lane % 4 * 4;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool exists = m + q < args.M;
      step.grad[q].template load<kWhole>(grad + static_cast<int64_t>(first_m + q) * args.N,
                                         exists ? args.N - first_n - 4 * g : 0);
      step.x[q].template load<kWhole>(x + static_cast<int64_t>(first_m + q) * args.K,
                                      exists ? args.K - first_k - kRun * g : 0);
      step.scale[q] = exists ? args.act_scale[m + q] : 0.0f;
    }
  }

  __device__ __forceinline__ void add(const Step& step) {
    uint32_t a[2][kPieces][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int q = r / 2 * 2, n = 2 * i + r % 2;
        split_pair(step.grad[q][n] * step.scale[q], step.grad[q + 1][n] * step.scale[q + 1], r, a[i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t b0 = bf16_pair(step.x[0].words[j / 4], step.x[1].words[j / 4], j % 4);
      const uint32_t b1 = bf16_pair(step.x[2].words[j / 4], step.x[3].words[j / 4], j % 4);
      multiply(acc[0][j], a[0], b0, b1);
      multiply(acc[1][j], a[1], b0, b1);
    }
  }

  // Run [pair of n][n of the pair][column parity]: the kRun columns j.
  __device__ __forceinline__ float value(int run, int j) const {
    return acc[run / 4][j][run / 2 % 2 * 2 + run % 2];
  }
  __device__ __forceinline__ void store(int run, const float (&values)[kRun]) const {
    const int lane = threadIdx.x % 32;
    const int n = first_n + lane / 4 * 4 + run / 2;
    const int k = first_k + (lane % 4 * 2 + run % 2) * kRun;
    if (n >= args.N) return;
    const int64_t offset = static_cast<int64_t>(n) * args.K + k;
    const int valid = args.K - k;
    if (args.weight_dtype == DType::kFloat32) {
      store_floats<kRun>(static_cast<float*>(args.grad_weight) + offset, valid, kWhole, values);
    } else if (args.weight_dtype == DType::kBFloat16) {
      store_floats<kRun>(static_cast<__nv_bfloat16*>(args.grad_weight) + offset, valid, kWhole, values);
    } else {
      store_floats<kRun>(static_cast<__half*>(args.grad_weight) + offset, valid, kWhole, values);
    }
  }
};

// --- kernel ------------------------------------------------------------------------------------------------

// `rank` of the `parts` blocks of a cluster that share a tile: each takes a part of the contraction.
template <typename Task>
__device__ __forceinline__ void run_task(
    const SmallGradArgs& args, int tile, int rank, int parts, float4* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kDepth = Task::kDepth, kVectors = Task::kRun / 4;
  const int stride = kWarps * parts;
  Task task(args, tile);
  typename Task::Step ring[kDepth];
  const int first = rank * kWarps + warp;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (first + d * stride < task.num_steps) task.load(first + d * stride, ring[d]);
  }
  for (int base = first; base < task.num_steps; base += kDepth * stride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int index = base + d * stride;
      if (index < task.num_steps) task.add(ring[d]);
      if (index + kDepth * stride < task.num_steps) task.load(index + kDepth * stride, ring[d]);
    }
  }
  // Not sooner: blocks of the next kernel would wait on multiprocessors that have blocks of this one to come.
  allow_next_kernel();

  // Warp w sums run w of all warps' lanes.
  static_assert(Task::kRuns == kWarps);
#pragma unroll
  for (int run = 0; run < Task::kRuns; ++run) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      sums[((warp * Task::kRuns + run) * kVectors + v) * 32 + lane] = make_float4(task.value(run, 4 * v),
                                                                                  task.value(run, 4 * v + 1),
                                                                                  task.value(run, 4 * v + 2),
                                                                                  task.value(run, 4 * v + 3));
    }
  }
  __syncthreads();
  float values[Task::kRun] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 part = sums[((w * Task::kRuns + warp) * kVectors + v) * 32 + lane];
      values[4 * v] += part.x, values[4 * v + 1] += part.y;
      values[4 * v + 2] += part.z, values[4 * v + 3] += part.w;
    }
  }
  if constexpr (Task::kRun == 4) {
    if (parts > 1) {
      // Each block adds a share of the tile, over the blocks in their order.
      float4* exchange = sums + kExchange;
      exchange[threadIdx.x] = make_float4(values[0], values[1], values[2], values[3]);
      cluster_barrier();
      const bool mine = static_cast<int>(threadIdx.x) * parts / kThreads == rank;
      if (mine) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = 0.0f;
        for (int r = 0; r < parts; ++r) {
          const float4 part = load_cluster_16(exchange + threadIdx.x, static_cast<uint32_t>(r));
          values[0] += part.x, values[1] += part.y, values[2] += part.z, values[3] += part.w;
        }
        task.store(warp, values);
      }
      cluster_barrier();  // the others may still be reading
      return;
    }
  }
  task.store(warp, values);
}

// The blocks of grad_x, which are the longer ones, come first.
template <typename T, bool kWhole, int kWeightCols>
__global__ void __launch_bounds__(kThreads, 2)
    small_grad_kernel(const __grid_constant__ SmallGradArgs args, int input_tiles, int weight_tiles) {
  extern __shared__ __align__(16) float4 sums[];
  wait_for_previous_kernel();
  const int block = static_cast<int>(blockIdx.x), input_blocks = input_tiles * args.parts;
  if (block < input_blocks) {
    run_task<InputTask<T, kWhole>>(args, block / args.parts, block % args.parts, args.parts, sums);
  } else if (block - input_blocks < weight_tiles) {
    run_task<WeightTask<T, kWhole, kWeightCols>>(args, block - input_blocks, 0, 1, sums);
  }
}

template <typename Task>
int64_t count_tiles(int64_t rows, int64_t cols) {
  return ceil_div(rows, Task::kRows) * ceil_div(cols, Task::kCols);
}

template <typename T, bool kWhole>
cudaError_t launch(const SmallGradArgs& args, cudaStream_t stream) {
  constexpr int kCols = 32;
  using Input = InputTask<T, kWhole>;
  using Weight = WeightTask<T, kWhole, kCols>;
  const int64_t input_tiles = args.grad_x != nullptr ? count_tiles<Input>(args.M, args.K) : 0;
  const int64_t weight_tiles = args.grad_weight != nullptr ? count_tiles<Weight>(args.N, args.K) : 0;
  if (input_tiles + weight_tiles == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(input_tiles * args.parts + weight_tiles, args.parts) * args.parts;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = small_grad_kernel<T, kWhole, kCols>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_clusters(kernel,
                         args.parts,
                         static_cast<unsigned>(blocks),
                         kThreads,
                         kSharedBytes,
                         stream,
                         args.dependent_launch,
                         args,
                         static_cast<int>(input_tiles),
                         static_cast<int>(weight_tiles));
}

}  // namespace

cudaError_t launch_small_grad(const SmallGradArgs& args, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return dispatch_dtype(args.grad_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool whole = args.N % 4 == 0 && args.K % 8 == 0 && aligned(args.grad_y) && aligned(args.x_i8) &&
                       aligned(args.grad_x) && aligned(args.grad_weight);
    return whole ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
  });
}

}  // namespace bitnet_ext::cuda
