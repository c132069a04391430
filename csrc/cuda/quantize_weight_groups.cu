// Absmean quantisation of many latent weights to prepacked ternary codes: all weights of a model in two
// launches, or in one where the optimiser has already summed |w| (adam.cu).
//
//   s_i = max(mean |w_i|, 1e-5);   code = clamp(rint(w_i / s_i), -1, 1)     w_i [N_i, K_i] -> prepacked
//   blocks
//
// The sums are those of quantize_weight.cu in the same order, hence the same bits. Bound by memory: 4 bytes a
// weight read (fp32; 8 with the sums), a quarter written. A thread block makes 8 or more blocks of 16 x 128,
// one a warp, after adding up the (at most 1,024) partial sums of its weight: 8 KB from L2 for 64 KB or more
// of weights.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/tensor_table.cuh"
#include "cuda/common/ternary_weight.cuh"
#include "cuda/quantize_weight.h"
#include "cuda/quantize_weight_groups.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = kWeightThreads;
constexpr uint32_t kWarps = kThreads / kLanes;
// A warp of a large weight makes this many blocks, which spreads the cost of the sum over them.
constexpr uint32_t kRounds = 2;
constexpr uint32_t kSmallWeight = 512;  // thread blocks; up to here one round, to use every multiprocessor
constexpr int kPrepackBlocksPerSm = 2;  // as in quantize_weight.cu: registers for all 16 loads of a lane
static_assert(sizeof(WeightTable) + 64 <= 4096, "kernel parameters hold 4 KB");

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    abs_sums_kernel(const __grid_constant__ WeightTable table, double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  const int t = find_entry(table.partials_end, table.count, blockIdx.x);
  const uint32_t first = t == 0 ? 0 : table.partials_end[t - 1];
  const int64_t numel = static_cast<int64_t>(table.N[t]) * table.K[t];
  const int64_t run = absmean_run(numel);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - first) * run;
  const scalar_t* weight = static_cast<const scalar_t*>(table.weight[t]);
  const double sum = abs_partial(weight, begin, min(begin + run, numel), is_aligned(weight, 16), scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kPrepackBlocksPerSm)
    quantize_weights_kernel(const __grid_constant__ WeightTable table, const double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  const int t = find_entry(table.block_end, table.count, blockIdx.x);
  const uint32_t first_block = t == 0 ? 0 : table.block_end[t - 1];
  const uint32_t first_partial = t == 0 ? 0 : table.partials_end[t - 1];
  const int64_t N = table.N[t], K = table.K[t];
  const float scale = absmean_scale(
      partials + first_partial, static_cast<int>(table.partials_end[t] - first_partial), N, K, scratch);
  if (blockIdx.x == first_block && threadIdx.x == 0) *table.weight_scale[t] = scale;
  const float half = __fmul_rn(0.5f, scale);

  const scalar_t* weight = static_cast<const scalar_t*>(table.weight[t]);
  const bool vectors = K % 4 == 0 && is_aligned(weight, 4 * sizeof(scalar_t));
  const uint32_t blocks_wide = static_cast<uint32_t>(block_cols(K));
  const uint32_t num_blocks = static_cast<uint32_t>(block_rows(N)) * blocks_wide;
  const uint32_t stride = (table.block_end[t] - first_block) * kWarps;
  uint4* prepacked = static_cast<uint4*>(table.prepacked[t]);
  for (uint32_t block = (blockIdx.x - first_block) * kWarps + threadIdx.x / kLanes; block < num_blocks;
       block += stride) {
    prepacked[static_cast<int64_t>(block) * kLanes + threadIdx.x % kLanes] =
        prepack_block(weight,
                      N,
                      K,
                      static_cast<int64_t>(block / blocks_wide) * kBlockRows,
                      static_cast<int64_t>(block % blocks_wide) * kBlockCols,
                      vectors,
                      half);
  }
  // A product launched as a dependent kernel may read the codes as soon as the blocks of this one have ended.
  __threadfence();
}

}  // namespace

uint32_t quantize_blocks(int64_t N, int64_t K) {
  const int64_t warps = block_rows(N) * block_cols(K);
  const int64_t blocks = ceil_div(warps, kWarps);
  return static_cast<uint32_t>(blocks <= kSmallWeight ? blocks : ceil_div(blocks, kRounds));
}

cudaError_t launch_abs_sums(const WeightTable& table, DType dtype, double* partials, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    abs_sums_kernel<scalar_t><<<table.partials_end[table.count - 1], kThreads, 0, stream>>>(table, partials);
    return 0;
  });
  return cudaGetLastError();
}

cudaError_t launch_quantize_weights(const WeightTable& table,
                                    DType dtype,
                                    const double* partials,
                                    cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    quantize_weights_kernel<scalar_t>
        <<<table.block_end[table.count - 1], kThreads, 0, stream>>>(table, partials);
    return 0;
  });
  return cudaGetLastError();
}

}  // namespace bitnet_ext::cuda
