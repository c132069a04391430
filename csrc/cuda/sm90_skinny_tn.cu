// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_90a):
//
//   tn: out[v, h] (+)= sum_t grad[t, v] * hidden[t, h]       the gradient of an output layer's weight
//
// A block keeps the pieces of `hidden`, transposed, in shared memory. Its two warpgroups walk over tiles of
// 64 columns of grad, each by itself and without a barrier: all 128 tokens of a column go from memory
// straight into fragments (sm90_skinny.cuh), which are multiplied by one half of the 256 columns of `hidden`
// and then by the other. There is one power of two for the 128 tokens; small products come first, then hi hi,
// of which eight additions are chopped.
//
// T = 128, H = 256, V = 50,257: 786 tiles for 264 warpgroups, three each. Two tiles are 6,144 clocks of the
// tensor cores and 192 kB of memory, 11,100 clocks at 4.2 TB/s: bytes bound it (26 MB of grad, 51 of the
// result).
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ld_global.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/skinny_mm.h"
#include "cuda/sm90_skinny.cuh"

// Older architectures leave the kernel's body out and what it uses unused.
#pragma nv_diag_suppress 177

namespace bitnet_ext::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kSkinnyTokens);

struct Sm90TnTraits {
  static constexpr int kWarpgroups = 2, kWarpgroup = 128;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kTile = 64;  // columns of grad
  static constexpr int kSteps = kTokens / 16;
  // Half a result's columns: two chunks of tokens of hi and lo.
  static constexpr int kHalfBytes = kTokens / kSkinnyChunk * kSkinnyChunkBytes;
  static constexpr int kScales = 2 * kHalfBytes;
  static constexpr int kSharedBytes = kScales + static_cast<int>(kSkinnyMaxHidden) * 4;
};

// The column of `hidden` that is column 8 j + 2 t + e of the products: so ordered, a thread's sums of columns
// 8 j and 8 j + 8 (j even) are four neighbours of the result.
__device__ __forceinline__ int hidden_column(int col) {
  return col / 16 * 16 + col % 8 / 2 * 4 + col / 8 % 2 * 2 + col % 2;
}

// The pieces of `hidden`, a column a thread.
__device__ __forceinline__ void hold(const SkinnyArgs& args, uint8_t* shared, int first_token) {
  using Traits = Sm90TnTraits;
  const int thread = static_cast<int>(threadIdx.x), row = thread % kSkinnyCols;
  const int col = hidden_column(thread);
  float x[kTokens];  // one trip to memory
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    x[k] = load_once_float(args.hidden + static_cast<int64_t>(first_token + k) * args.H + col,
                           first_token + k < args.T && col < args.H);
  }
  float top = 0.0f;
#pragma unroll
  for (int k = 0; k < kTokens; ++k) top = larger_magnitude(top, x[k]);
  const Scale scale(__float_as_uint(top));
  reinterpret_cast<float*>(shared + Traits::kScales)[col] = scale.down();
  uint8_t* half = shared + thread / kSkinnyCols * Traits::kHalfBytes;
#pragma unroll
  for (int k = 0; k < kTokens; k += 8) {
    Pieces pieces[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pieces[i] = split(x[k + 2 * i], x[k + 2 * i + 1], scale.up());
    uint8_t* to = half + k / kSkinnyChunk * kSkinnyChunkBytes + swizzled(row, k % kSkinnyChunk / 8);
    *reinterpret_cast<uint4*>(to) = make_uint4(pieces[0].hi, pieces[1].hi, pieces[2].hi, pieces[3].hi);
    *reinterpret_cast<uint4*>(to + kSkinnyPlaneBytes) =
        make_uint4(pieces[0].lo, pieces[1].lo, pieces[2].lo, pieces[3].lo);
  }
}

__global__ void __launch_bounds__(Sm90TnTraits::kThreads, 1)
    sm90_skinny_tn_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles, int first_token) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = Sm90TnTraits;
  constexpr int kSteps = Traits::kSteps, kStepsOfChunk = kSkinnyChunk / 16;
  extern __shared__ __align__(1024) uint8_t shared[];  // as the swizzle needs it
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int stride = static_cast<int>(gridDim.x) * Traits::kWarpgroups;
  // Neighbours in memory for the warpgroups of a block
  int tile = static_cast<int>(blockIdx.x) * Traits::kWarpgroups + thread / Traits::kWarpgroup;
  // Rows g and g + 8 of a fragment are columns 2 g and 2 g + 1 of a warp's 16.
  const int warp_col = thread % Traits::kWarpgroup / 32 * 16 + 2 * g;
  const bool accumulate = args.accumulate || first_token > 0;
  float x[2][4 * kSteps];
  const auto load = [&](int index) {
    if (index >= num_tiles) return;
    const int v = index * Traits::kTile + warp_col;
    const float* corner = args.grad + static_cast<int64_t>(first_token + 2 * t) * args.stride + v;
    const int valid = min(2, args.V - v);  // beyond V stands anything, or nothing behind the last row
#pragma unroll
    for (int k = 0; k < 4 * kSteps; ++k) {
      const int token = k / 2 * 8 + k % 2;
      const float2 pair =
          load_once_up_to_2(corner + token * args.stride, first_token + 2 * t + token < args.T ? valid : 0);
      x[0][k] = pair.x, x[1][k] = pair.y;
    }
  };
  wait_for_previous_kernel();
  allow_next_kernel();
  load(tile);  // on its way from memory while `hidden` is cut
  hold(args, shared, first_token);
  fence_async_proxy();  // the products read through the async proxy
  __syncthreads();

  const float* column_scales = reinterpret_cast<const float*>(shared + Traits::kScales);
  const uint64_t right = wgmma_descriptor(shared);
  const auto right_step = [&](int half, int s) {
    return right + half * (Traits::kHalfBytes / 16) + s / kStepsOfChunk * (kSkinnyChunkBytes / 16) +
           2 * (s % kStepsOfChunk);
  };
#pragma unroll 1
  for (; tile < num_tiles; tile += stride) {
    const Scale scales[2] = {row_scale(x[0]), row_scale(x[1])};
    const float up[2] = {scales[0].up(), scales[1].up()}, down[2] = {scales[0].down(), scales[1].down()};
    uint32_t hi[kSteps][4], lo[kSteps][4];
    float sums[64];
    const auto store = [&](int half) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int v = tile * Traits::kTile + warp_col + row;
        if (v >= args.V) continue;
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
          const int col = half * kSkinnyCols + 8 * j + 4 * t;
          if (col >= args.H) continue;
          const float4 factor = *reinterpret_cast<const float4*>(column_scales + col);
          float4* out = reinterpret_cast<float4*>(args.out + static_cast<int64_t>(v) * args.H + col);
          float4 value = make_float4(sums[4 * j + 2 * row] * down[row] * factor.x,
                                     sums[4 * j + 2 * row + 1] * down[row] * factor.y,
                                     sums[4 * j + 4 + 2 * row] * down[row] * factor.z,
                                     sums[4 * j + 5 + 2 * row] * down[row] * factor.w);
          if (accumulate) {
            const float4 before = *out;
            value.x += before.x, value.y += before.y, value.z += before.z, value.w += before.w;
          }
          *out = value;
        }
      }
    };
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      split_step(x, s, up, hi[s], lo[s]);
      wgmma_fence();
      wgmma_m64n128_f16(sums, hi[s], right_step(0, s) + kSkinnyPlaneStep, s > 0);
      wgmma_m64n128_f16(sums, lo[s], right_step(0, s), 1);
      wgmma_commit();
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) wgmma_m64n128_f16(sums, hi[s], right_step(0, s), 1);
    wgmma_commit();
    load(tile + stride);
    wgmma_wait<0>();
    wgmma_not_before(sums);
    store(0);
    if (args.H <= kSkinnyCols) continue;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      wgmma_m64n128_f16(sums, hi[s], right_step(1, s) + kSkinnyPlaneStep, s > 0);
      wgmma_m64n128_f16(sums, lo[s], right_step(1, s), 1);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) wgmma_m64n128_f16(sums, hi[s], right_step(1, s), 1);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_not_before(sums);
    store(1);
  }
#else
  __trap();  // never launched: the host checks that code for this device was compiled
#endif
}

}  // namespace

cudaError_t launch_sm90_skinny_tn(const SkinnyArgs& args, int max_blocks, cudaStream_t stream) {
  using Traits = Sm90TnTraits;
  const int tiles = static_cast<int>(ceil_div(args.V, Traits::kTile));
  const int blocks = static_cast<int>(ceil_div(tiles, Traits::kWarpgroups));
  int grid = blocks < max_blocks ? blocks : max_blocks;
  // Pairs take both multiprocessors of a TPC. Single blocks on half of the GPU take one of each, and then
  // another stream's clusters of two find no room (small_grad.cu: 45 us of each step of collapse-256).
  const int cluster = grid > 1 ? 2 : 1;
  grid -= grid % cluster;
  cudaError_t status = cudaFuncSetAttribute(
      sm90_skinny_tn_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  int first = 0;
  do {
    if (status != cudaSuccess) return status;
    status = launch_clusters(sm90_skinny_tn_kernel,
                             cluster,
                             static_cast<unsigned>(grid),
                             Traits::kThreads,
                             Traits::kSharedBytes,
                             stream,
                             args.dependent_launch,
                             args,
                             tiles,
                             first);
    first += kTokens;
  } while (first < args.T);
  return status;
}

}  // namespace bitnet_ext::cuda
