// Absmean quantisation of many latent weights to prepacked ternary codes: all weights of a model in two
// launches, or in one where the optimiser has already summed |w| (adam.cu).
//
//   s_i = max(mean |w_i|, 1e-5);   code = clamp(rint(w_i / s_i), -1, 1)     w_i [N_i, K_i] -> prepacked
//   blocks
//
// The sums are those of quantize_weight.cu in the same order, hence the same bits. Bound by memory: 4 bytes a
// weight read (fp32; 8 with the sums), a quarter written. A thread block makes 8 to 32 blocks of 16 x 128,
// a warp one at a time, after adding up the (at most 1,024) partial sums of its weight: 8 KB from L2 for 64
// KB or more of weights, during which the first of these weights are fetched.
#include <algorithm>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_table.cuh"
#include "cuda/common/ternary_weight.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/quantize_weight.h"
#include "cuda/quantize_weight_groups.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = kWeightThreads;
constexpr uint32_t kWarps = kThreads / kLanes;
// A warp makes up to so many blocks, which spreads the cost of the sum over them.
constexpr int64_t kMaxRounds = 4;
constexpr int kPrepackBlocksPerSm = 2;  // as in quantize_weight.cu: registers for all 16 loads of a lane
static_assert(sizeof(WeightTable) + 64 <= 4096, "kernel parameters hold 4 KB");

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    abs_sums_kernel(const __grid_constant__ WeightTable table, double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int t = find_entry(table.partials_end, table.count, blockIdx.x);
  const uint32_t first = t == 0 ? 0 : table.partials_end[t - 1];
  const int64_t numel = static_cast<int64_t>(table.N[t]) * table.K[t];
  const int64_t run = absmean_run(numel);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - first) * run;
  const scalar_t* weight = static_cast<const scalar_t*>(table.weight[t]);
  const double sum = abs_partial(weight, begin, min(begin + run, numel), is_aligned(weight, 16), scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Starts fetching a block of 16 x 128 into L2 while the sums are added up: a lane half a row or less.
template <typename scalar_t>
__device__ __forceinline__ void prefetch_block(
    const scalar_t* weight, int64_t N, int64_t K, uint32_t block, uint32_t blocks_wide) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(scalar_t));  // elements of a line of the cache
  constexpr int kLines = kBlockCols / kLine;                       // of a row of the block
  const int64_t first_row = static_cast<int64_t>(block / blocks_wide) * kBlockRows;
  const int64_t first_col = static_cast<int64_t>(block % blocks_wide) * kBlockCols;
#pragma unroll
  for (int i = threadIdx.x % kLanes; i < kBlockRows * kLines; i += kLanes) {
    const int64_t row = first_row + i / kLines, col = first_col + i % kLines * kLine;
    if (row < N && col < K) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + row * K + col));
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kPrepackBlocksPerSm)
    quantize_weights_kernel(const __grid_constant__ WeightTable table, const double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  const int t = find_entry(table.block_end, table.count, blockIdx.x);
  const uint32_t first_block = t == 0 ? 0 : table.block_end[t - 1];
  const uint32_t first_partial = t == 0 ? 0 : table.partials_end[t - 1];
  const int64_t N = table.N[t], K = table.K[t];
  // It does not allow the next kernel: a product that reads the codes may then start only when the blocks of
  // this one have ended.
  wait_for_previous_kernel();
  const scalar_t* weight = static_cast<const scalar_t*>(table.weight[t]);
  const uint32_t blocks_wide = static_cast<uint32_t>(block_cols(K));
  const uint32_t num_blocks = static_cast<uint32_t>(block_rows(N)) * blocks_wide;
  const uint32_t stride = (table.block_end[t] - first_block) * kWarps;
  uint32_t block = (blockIdx.x - first_block) * kWarps + threadIdx.x / kLanes;
  if (block < num_blocks) prefetch_block(weight, N, K, block, blocks_wide);
  const float scale = absmean_scale(
      partials + first_partial, static_cast<int>(table.partials_end[t] - first_partial), N, K, scratch);
  if (blockIdx.x == first_block && threadIdx.x == 0) *table.weight_scale[t] = scale;
  const float half = __fmul_rn(0.5f, scale);

  const bool vectors = K % 4 == 0 && is_aligned(weight, 4 * sizeof(scalar_t));
  uint4* prepacked = static_cast<uint4*>(table.prepacked[t]);
  for (; block < num_blocks; block += stride) {
    prepacked[static_cast<int64_t>(block) * kLanes + threadIdx.x % kLanes] =
        prepack_block(weight,
                      N,
                      K,
                      static_cast<int64_t>(block / blocks_wide) * kBlockRows,
                      static_cast<int64_t>(block % blocks_wide) * kBlockCols,
                      vectors,
                      half);
  }
  // What such a product reads has to be there by then.
  __threadfence();
}

}  // namespace

int quantize_rounds(int64_t layout_blocks, int num_sms) {
  const int64_t resident = int64_t{kWarps} * kPrepackBlocksPerSm * num_sms;
  return static_cast<int>(
      std::min<int64_t>(kMaxRounds, std::max<int64_t>(1, layout_blocks / (4 * resident))));
}

uint32_t quantize_blocks(int64_t N, int64_t K, int rounds) {
  return static_cast<uint32_t>(ceil_div(block_rows(N) * block_cols(K), kWarps * rounds));
}

cudaError_t launch_abs_sums(
    const WeightTable& table, DType dtype, double* partials, bool dependent, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  return dispatch_dtype(dtype, [&](auto tag) {
    return launch_kernel(abs_sums_kernel<typename decltype(tag)::type>,
                         table.partials_end[table.count - 1],
                         kThreads,
                         0,
                         stream,
                         dependent,
                         table,
                         partials);
  });
}

cudaError_t launch_quantize_weights(
    const WeightTable& table, DType dtype, const double* partials, bool dependent, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  return dispatch_dtype(dtype, [&](auto tag) {
    const auto kernel = quantize_weights_kernel<typename decltype(tag)::type>;
    const cudaError_t status = leave_shared_memory(kernel);
    if (status != cudaSuccess) return status;
    return launch_kernel(
        kernel, table.block_end[table.count - 1], kThreads, 0, stream, dependent, table, partials);
  });
}

}  // namespace bitnet_ext::cuda
