// Absmean quantisation of a latent weight to {-1, 0, 1}.
//
//   s = max(mean |w|, 1e-5);   code = clamp(rint(w / s), -1, 1)       w [N, K] -> codes [N, K], packed bytes
//                                                                    or prepacked blocks
//
// Two launches: fp64 partial sums over fixed runs of elements, then codes. Every block of the second launch
// adds the (at most 1,024) partials itself, in one order, which costs 8 KB of L2 reads and saves a third
// launch; no atomics, so the scale is the same bits every time. Bound by memory: the weight is read twice,
// the second time partly from L2.
//
// Prepacked (csrc/prepacked.h): a warp makes one block of 16 x 128 (common/ternary_weight.cuh); a lane stores
// one vector of 16 bytes, a warp 512 bytes in a row. These writes end with __threadfence(), because a product
// launched as a dependent kernel may read the weights as soon as the blocks of this one have ended.
//
// A NaN or Inf in the weight makes s NaN.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_tiling.cuh"
#include "cuda/common/ternary_weight.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/quantize_weight.h"
#include "packing.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = kWeightThreads;
static_assert(kThreads == RowTiling::kThreads, "codes are tiled by it");
// Blocks of the second pass: enough to fill any GPU, few enough that adding up the partials stays small.
constexpr uint32_t kMaxBlocks = 2048;
constexpr uint32_t kWarps = kThreads / kLanes;
// Lets the compiler keep all 16 loads of a lane in flight; otherwise it saves registers and waits for each.
constexpr int kPrepackBlocksPerSm = 2;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    absmean_partials_kernel(const scalar_t* __restrict__ weight,
                            int64_t numel,
                            int64_t run,  // elements of a partial sum, a multiple of kVec
                            double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  const int64_t begin = blockIdx.x * run;
  const double sum = abs_partial(weight, begin, min(begin + run, numel), is_aligned(weight, 16), scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// The scale from the partial sums, the same bits in every block, and half of it: the threshold of the codes.
// Block 0 writes the scale.
__device__ __forceinline__ float half_scale(
    const double* partials, int num_partials, int64_t N, int64_t K, double* scratch, float* weight_scale) {
  const float scale = absmean_scale(partials, num_partials, N, K, scratch);
  if (blockIdx.x == 0 && threadIdx.x == 0) *weight_scale = scale;
  return __fmul_rn(0.5f, scale);
}

// One unit is four weights: one packed byte, or four int8 codes.
template <typename scalar_t, bool kPack>
__global__ void __launch_bounds__(kThreads) quantize_weight_kernel(const scalar_t* __restrict__ weight,
                                                                   RowTiling tiling,
                                                                   int64_t K,
                                                                   const double* __restrict__ partials,
                                                                   int num_partials,
                                                                   void* __restrict__ out,
                                                                   float* __restrict__ weight_scale) {
  __shared__ double scratch[kThreads / 32];
  const float half = half_scale(partials, num_partials, tiling.rows, K, scratch, weight_scale);

  constexpr unsigned kLoadBytes = 4 * sizeof(scalar_t);
  for (uint32_t tile = blockIdx.x; tile < tiling.num_tiles; tile += gridDim.x) {
    const int64_t row = tiling.row(tile);
    const int64_t unit = tiling.unit(tile);
    if (row >= tiling.rows || unit >= tiling.units) continue;
    const int64_t offset = row * K + unit * 4;
    const int64_t valid = K - unit * 4;
    float values[4];
    load_floats(weight + offset, valid, is_aligned(weight + offset, kLoadBytes), values);
    int codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = ternary_code(values[i], half);
    if constexpr (kPack) {
      // Places beyond K were read as 0 and become code 0, as the layout demands.
      const int byte = (codes[0] + 1) | (codes[1] + 1) << 2 | (codes[2] + 1) << 4 | (codes[3] + 1) << 6;
      static_cast<uint8_t*>(out)[row * tiling.units + unit] = static_cast<uint8_t>(byte);
    } else {
      int8_t* target = static_cast<int8_t*>(out) + offset;
      store_int8(target, valid, is_aligned(target, 4), codes);
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kPrepackBlocksPerSm)
    quantize_prepack_kernel(const scalar_t* __restrict__ weight,
                            int64_t N,
                            int64_t K,
                            uint32_t blocks_wide,
                            uint32_t num_blocks,  // of the layout
                            const double* __restrict__ partials,
                            int num_partials,
                            uint4* __restrict__ prepacked,
                            float* __restrict__ weight_scale) {
  __shared__ double scratch[kThreads / 32];
  const float half = half_scale(partials, num_partials, N, K, scratch, weight_scale);

  constexpr unsigned kLoadBytes = 4 * sizeof(scalar_t);
  const int lane = threadIdx.x % kLanes;
  const bool vectors = K % 4 == 0 && is_aligned(weight, kLoadBytes);
  for (uint32_t block = blockIdx.x * kWarps + threadIdx.x / kLanes; block < num_blocks;
       block += gridDim.x * kWarps) {
    const int64_t first_row = static_cast<int64_t>(block / blocks_wide) * kBlockRows;
    const int64_t first_col = static_cast<int64_t>(block % blocks_wide) * kBlockCols;
    prepacked[static_cast<int64_t>(block) * kLanes + lane] =
        prepack_block(weight, N, K, first_row, first_col, vectors, half);
  }
  __threadfence();
}

template <typename scalar_t>
cudaError_t launch(const QuantizeWeightArgs& args, cudaStream_t stream) {
  const scalar_t* weight = static_cast<const scalar_t*>(args.weight);
  const int64_t numel = args.N * args.K;
  const int64_t num_partials = absmean_partials(numel);
  const int64_t run = absmean_run(numel);
  const RowTiling tiling = make_row_tiling(args.N, packed_bytes(args.K));
  const int64_t num_blocks = block_rows(args.N) * block_cols(args.K);
  if (tiling.num_tiles == 0 || num_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;

  absmean_partials_kernel<scalar_t>
      <<<static_cast<unsigned>(num_partials), kThreads, 0, stream>>>(weight, numel, run, args.partials);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  const unsigned tiles =
      args.prepacked != nullptr ? static_cast<unsigned>(ceil_div(num_blocks, kWarps)) : tiling.num_tiles;
  const unsigned blocks = tiles < kMaxBlocks ? tiles : kMaxBlocks;
  if (args.prepacked != nullptr) {
    quantize_prepack_kernel<scalar_t>
        <<<blocks, kThreads, 0, stream>>>(weight,
                                          args.N,
                                          args.K,
                                          static_cast<uint32_t>(block_cols(args.K)),
                                          static_cast<uint32_t>(num_blocks),
                                          args.partials,
                                          static_cast<int>(num_partials),
                                          static_cast<uint4*>(args.prepacked),
                                          args.weight_scale);
  } else if (args.packed != nullptr) {
    quantize_weight_kernel<scalar_t, true><<<blocks, kThreads, 0, stream>>>(weight,
                                                                            tiling,
                                                                            args.K,
                                                                            args.partials,
                                                                            static_cast<int>(num_partials),
                                                                            args.packed,
                                                                            args.weight_scale);
  } else {
    quantize_weight_kernel<scalar_t, false><<<blocks, kThreads, 0, stream>>>(
        weight, tiling, args.K, args.partials, static_cast<int>(num_partials), args.codes, args.weight_scale);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantize_weight(const QuantizeWeightArgs& args, cudaStream_t stream) {
  return dispatch_dtype(args.dtype,
                        [&](auto tag) { return launch<typename decltype(tag)::type>(args, stream); });
}

}  // namespace bitnet_ext::cuda
