// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_90a):
//
//   nt: out[t, v] = sum_h hidden[t, h] * weight[v, h]        the logits of an output layer
//
// A block keeps the pieces of `hidden` (128 x 256) in shared memory. Its two warpgroups walk over tiles of 64
// rows of weight, each by itself and without a barrier: chunks of 64 columns go from memory straight into
// fragments (sm90_skinny.cuh), the tile's sums, transposed, to memory.
//
// T = 128, H = 256, V = 50,257: 786 tiles for 264 warpgroups, three each. Two tiles are 6,144 clocks of the
// tensor cores and 192 kB of memory, 11,100 clocks at 4.2 TB/s: bytes bound it (51 MB of weight, 26 of
// logits).
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ld_global.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/skinny_mm.h"
#include "cuda/sm90_skinny.cuh"

// Older architectures leave the kernel's body out and what it uses unused.
#pragma nv_diag_suppress 177

namespace bitnet_ext::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kSkinnyTokens);

// kAhead: tiles of weight that are brought to L2 before they are loaded, 0 for none.
template <int kAhead_>
struct Sm90NtTraits {
  static constexpr int kAhead = kAhead_;
  static constexpr int kWarpgroups = 2, kWarpgroup = 128;
  static constexpr int kThreads = kWarpgroups * kWarpgroup, kWarps = kThreads / 32;
  static constexpr int kTile = 64;  // rows of weight
  static constexpr int kChunks = static_cast<int>(kSkinnyMaxHidden) / kSkinnyChunk;
  static constexpr int kScales = kChunks * kSkinnyChunkBytes;
  static constexpr int kSharedBytes = kScales + kChunks * kTokens * 4;
};

// The pieces of `hidden`, a row a warp at a time: of 16 numbers of the contraction, lane t of four has
// 4 t .. 4 t + 3, which become numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, those of a fragment's lane t.
template <typename Traits>
__device__ __forceinline__ void hold(const SkinnyArgs& args, uint8_t* shared, int first_t) {
  constexpr int kRows = kTokens / Traits::kWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = (args.H + kSkinnyChunk - 1) / kSkinnyChunk;
  float* scales = reinterpret_cast<float*>(shared + Traits::kScales);
  // All rows of a warp at once: one trip to memory.
  float4 x[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int token = first_t + warp * kRows + r;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col = 128 * half + 4 * lane;
      x[r][half] = load_once_float4(args.hidden + static_cast<int64_t>(token) * args.H + col,
                                    token < args.T && col < args.H);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = warp * kRows + r;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = 2 * half + lane / 16;
      const Scale scale(lanes_max<1, 8>(magnitude(x[r][half])));
      if (chunk >= chunks) continue;
      const Pieces low = split(x[r][half].x, x[r][half].y, scale.up());
      const Pieces high = split(x[r][half].z, x[r][half].w, scale.up());
      uint8_t* plane = shared + chunk * kSkinnyChunkBytes + lane % 4 * 4;
      const int piece = lane % 16 / 4 * 2;
      *reinterpret_cast<uint32_t*>(plane + swizzled(row, piece)) = low.hi;
      *reinterpret_cast<uint32_t*>(plane + swizzled(row, piece + 1)) = high.hi;
      *reinterpret_cast<uint32_t*>(plane + kSkinnyPlaneBytes + swizzled(row, piece)) = low.lo;
      *reinterpret_cast<uint32_t*>(plane + kSkinnyPlaneBytes + swizzled(row, piece + 1)) = high.lo;
      if (lane % 16 == 0) scales[chunk * kTokens + row] = scale.down();
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_skinny_nt_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];  // as the swizzle needs it
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int first_t = static_cast<int>(blockIdx.y) * kTokens;
  const int chunks = (args.H + kSkinnyChunk - 1) / kSkinnyChunk;
  const int stride = static_cast<int>(gridDim.x) * Traits::kWarpgroups;
  // Neighbours in memory for the warpgroups of a block
  int tile = static_cast<int>(blockIdx.x) * Traits::kWarpgroups + thread / Traits::kWarpgroup;
  // Rows g and g + 8 of a fragment are rows 2 g and 2 g + 1 of a warp's 16.
  const int warp_row = thread % Traits::kWarpgroup / 32 * 16 + 2 * g;
  LeftChunk x;
  const auto load = [&](int index, int chunk) {
    if (index >= num_tiles) return;
    const int v = index * Traits::kTile + warp_row, col = chunk * kSkinnyChunk + 4 * t;
    const float* corner = args.weight + static_cast<int64_t>(v) * args.H + col;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const float4 four =
            load_once_float4(corner + row * args.H + 16 * s, v + row < args.V && col + 16 * s < args.H);
        x[row][4 * s] = four.x, x[row][4 * s + 1] = four.y;
        x[row][4 * s + 2] = four.z, x[row][4 * s + 3] = four.w;
      }
    }
  };
  // Part `chunk` of a tile's rows
  const auto fetch = [&](int index, int chunk) {
    if (Traits::kAhead == 0 || thread % Traits::kWarpgroup != 0 || blockIdx.y > 0 || index >= num_tiles)
      return;
    const int first = index * Traits::kTile + Traits::kTile * chunk / chunks;
    const int rows = min(index * Traits::kTile + Traits::kTile * (chunk + 1) / chunks, args.V) - first;
    if (rows <= 0) return;
    prefetch_bulk(args.weight + static_cast<int64_t>(first) * args.H,
                  static_cast<uint32_t>(rows * args.H * 4));
  };
#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) {
    for (int chunk = 0; chunk < chunks; ++chunk) fetch(tile + i * stride, chunk);
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  load(tile, 0);  // on its way from memory while `hidden` is cut
  hold<Traits>(args, shared, first_t);
  fence_async_proxy();  // the products read through the async proxy
  __syncthreads();

  const float* cols = reinterpret_cast<const float*>(shared + Traits::kScales);
  const uint64_t right = wgmma_descriptor(shared);
  for (; tile < num_tiles; tile += stride) {
    float total[64] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      fetch(tile + Traits::kAhead * stride, chunk);
      const Scale scales[2] = {row_scale(x[0]), row_scale(x[1])};
      const float up[2] = {scales[0].up(), scales[1].up()}, down[2] = {scales[0].down(), scales[1].down()};
      const bool last = chunk + 1 == chunks;
      float sums[64];
      multiply_chunk(sums, x, up, right + chunk * (kSkinnyChunkBytes / 16), [&] {
        load(last ? tile + stride : tile, last ? 0 : chunk + 1);
      });
      add_chunk(total, sums, down, cols + chunk * kTokens, lane);
    }
    const int v = tile * Traits::kTile + warp_row;
    if (v >= args.stride) continue;
    float* out = args.out + static_cast<int64_t>(first_t + 2 * t) * args.stride + v;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first_t + 2 * t + 8 * j + e >= args.T) continue;
        *reinterpret_cast<float2*>(out + (8 * j + e) * args.stride) =
            make_float2(total[4 * j + e], total[4 * j + 2 + e]);
      }
    }
  }
#else
  __trap();  // never launched: the host checks that code for this device was compiled
#endif
}

template <typename Traits>
cudaError_t launch(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  const int tiles = static_cast<int>(ceil_div(args.stride, Traits::kTile));
  const int blocks = static_cast<int>(ceil_div(tiles, Traits::kWarpgroups));
  const dim3 grid(static_cast<unsigned>(blocks < num_sms ? blocks : num_sms),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  const cudaError_t status = cudaFuncSetAttribute(
      sm90_skinny_nt_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(sm90_skinny_nt_kernel<Traits>,
                       grid,
                       Traits::kThreads,
                       Traits::kSharedBytes,
                       stream,
                       args.dependent_launch,
                       args,
                       tiles);
}

}  // namespace

cudaError_t launch_sm90_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  return launch<Sm90NtTraits<1>>(args, num_sms, stream);
}

}  // namespace bitnet_ext::cuda
