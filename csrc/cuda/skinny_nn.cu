// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_80):
//
//   nn: out[t, h] = sum_v grad[t, v] * weight[v, h]          the gradient of an output layer's input
//
// Each number is two fp16 numbers (common/two_pieces.cuh), each product three. The contraction is as long as
// the vocabulary: a block has 128 tokens x 128 columns of the result and a share of V, walks it in chunks of
// 32 whose rows and columns have powers of two of their own, and adds each chunk's sums in fp32 (tensor cores
// chop where an addition rounds). The shares' sums are added in their order by launch_skinny_sum. sm_90a has
// sm90_skinny_nn.cu.
#include "cuda/common/launch.cuh"
#include "cuda/common/two_pieces.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma_float.cuh"
#include "cuda/skinny_mm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kSkinnyTokens);

struct NnTraits {
  // 16 warps of 32 x 32 fit 128 registers each; 8 of 32 x 64 do not fit 255.
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kLanes = 32 / kWarps;     // that share a row of a warp's columns of weight
  static constexpr int kWarpCols = 32;           // of a warp's tile of 32 tokens
  static constexpr int kChunk = kSkinnyNnChunk;  // of V
  static constexpr int kCols = 128;              // of the result
  static constexpr int kRowBytesA = 144;         // 32 fp16 of each piece, and padding
  static constexpr int kRowBytesB = 272;         // 128 fp16, and padding
  static constexpr int kBytesA = kTokens * kRowBytesA;
  static constexpr int kPlaneBytesB = kChunk * kRowBytesB;
  static constexpr int kBufferBytes = kBytesA + 2 * kPlaneBytesB;
  static constexpr int kScales = kTokens + kCols;
  static constexpr int kCopies = 2 * (kBufferBytes + kScales * 4);
  static constexpr int kUnits = 2 * kLanes;  // of 16 bytes a thread copies
  static constexpr int kSharedBytes = kCopies + 2 * kUnits * kThreads * 16;
};

// Warp w multiplies tokens 32 (w % 4) .. by columns 32 (w / 4) ..; it loads 8 tokens of a chunk of grad and 8
// columns of a chunk of weight.
__global__ void __launch_bounds__(NnTraits::kThreads, 1)
    skinny_nn_kernel(const __grid_constant__ SkinnyArgs args) {
  using Traits = NnTraits;
  constexpr int kLanes = Traits::kLanes, kTilesH = Traits::kWarpCols / 8;
  extern __shared__ __align__(16) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_t = blockIdx.z * kTokens, first_h = blockIdx.y * Traits::kCols;
  const int warp_t = warp % 4 * 32, warp_h = warp / 4 * Traits::kWarpCols;
  const int chunks = (args.V + Traits::kChunk - 1) / Traits::kChunk;
  const int splits = static_cast<int>(gridDim.x), split_index = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * split_index / splits);
  const int end = static_cast<int>(static_cast<int64_t>(chunks) * (split_index + 1) / splits);
  wait_for_previous_kernel();
  allow_next_kernel();

  // A thread reads back what it copied itself, so the copies need no barrier.
  const auto copied = [&](int slot, int unit) {
    return shared + Traits::kCopies + ((slot * Traits::kUnits + unit) * Traits::kThreads + threadIdx.x) * 16;
  };
  const auto load = [&](int chunk, int slot) {
    if (chunk < end) {
      const int first_v = chunk * Traits::kChunk;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const int token = first_t + 4 * kLanes * warp + 4 * i + lane / 8, v = first_v + lane % 8 * 4;
        cp_async_16_bytes(copied(slot, i),
                          args.grad + static_cast<int64_t>(token) * args.stride + v,
                          token < args.T ? 4 * max(0, min(4, args.V - v)) : 0);
        const int row = first_v + 32 / kLanes * i + lane / kLanes;
        const int col = first_h + 4 * kLanes * warp + lane % kLanes * 4;
        cp_async_16(copied(slot, kLanes + i),
                    args.weight + static_cast<int64_t>(row) * args.H + col,
                    row < args.V && col < args.H);
      }
    }
    cp_async_commit();
  };
  const auto scales = [&](int buffer) {
    return reinterpret_cast<float*>(shared + 2 * Traits::kBufferBytes) + buffer * Traits::kScales;
  };
  const auto convert = [&](int buffer, int slot) {
    float4 grad[kLanes], weight[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      grad[i] = *reinterpret_cast<const float4*>(copied(slot, i));
      weight[i] = *reinterpret_cast<const float4*>(copied(slot, kLanes + i));
    }
    uint8_t* a = shared + buffer * Traits::kBufferBytes;
    uint8_t* b = a + Traits::kBytesA;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int token = 4 * kLanes * warp + 4 * i + lane / 8;
      const Scale scale(lanes_max<1, 4>(magnitude(grad[i])));
      uint8_t* row = a + token * Traits::kRowBytesA + lane % 8 * 8;
      split_to(grad[i], scale.up(), row, row + 64);
      if (lane % 8 == 0) scales(buffer)[token] = scale.down();
    }
    uint32_t top[4] = {};
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      top[0] = max(top[0], magnitude(weight[i].x)), top[1] = max(top[1], magnitude(weight[i].y));
      top[2] = max(top[2], magnitude(weight[i].z)), top[3] = max(top[3], magnitude(weight[i].w));
    }
    const int col = 4 * kLanes * warp + lane % kLanes * 4;
    float up[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Scale scale(lanes_max<kLanes, 16>(top[j]));
      up[j] = scale.up();
      if (lane < kLanes) scales(buffer)[kTokens + col + j] = scale.down();
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float4 v =
          make_float4(weight[i].x * up[0], weight[i].y * up[1], weight[i].z * up[2], weight[i].w * up[3]);
      uint8_t* row = b + (32 / kLanes * i + lane / kLanes) * Traits::kRowBytesB + col * 2;
      split_to(v, 1.0f, row, row + Traits::kPlaneBytesB);
    }
  };

  float sums[2][kTilesH][4] = {};
  const auto multiply = [&](int buffer) {
    const uint8_t* a =
        shared + buffer * Traits::kBufferBytes + (warp_t + lane % 16) * Traits::kRowBytesA + lane / 16 * 16;
    const uint8_t* b = shared + buffer * Traits::kBufferBytes + Traits::kBytesA +
                       lane / 16 * Traits::kPlaneBytesB + lane % 16 * Traits::kRowBytesB + warp_h * 2;
    uint32_t hi[2][2][4], lo[2][2][4];
    float down[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        ldmatrix_x4(hi[i][s], a + 16 * i * Traits::kRowBytesA + s * 32);
        ldmatrix_x4(lo[i][s], a + 16 * i * Traits::kRowBytesA + s * 32 + 64);
      }
      down[i][0] = scales(buffer)[warp_t + 16 * i + g];
      down[i][1] = scales(buffer)[warp_t + 16 * i + g + 8];
    }
#pragma unroll
    for (int j = 0; j < kTilesH; ++j) {
      uint32_t of[2][4];
#pragma unroll
      for (int s = 0; s < 2; ++s) ldmatrix_x4_transposed(of[s], b + 16 * s * Traits::kRowBytesB + j * 16);
      const float2 factor =
          *reinterpret_cast<const float2*>(scales(buffer) + kTokens + warp_h + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float chunk[4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          mma_m16n8k16_f16(chunk, hi[i][s], of[s][2], of[s][3]);
          mma_m16n8k16_f16(chunk, lo[i][s], of[s][0], of[s][1]);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) mma_m16n8k16_f16(chunk, hi[i][s], of[s][0], of[s][1]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums[i][j][c] = fmaf(chunk[c] * down[i][c / 2], c % 2 == 0 ? factor.x : factor.y, sums[i][j][c]);
        }
      }
    }
  };

  load(begin, 0);
  load(begin + 1, 1);
  cp_async_wait<1>();
  convert(0, 0);
  load(begin + 2, 0);
  __syncthreads();
  for (int chunk = begin; chunk < end; ++chunk) {
    const int buffer = (chunk - begin) % 2;
    // Half of the warps convert while the others multiply.
    const bool early = warp < Traits::kWarps / 2;
    if (!early) multiply(buffer);
    if (chunk + 1 < end) {
      cp_async_wait<1>();
      convert(buffer ^ 1, buffer ^ 1);
    }
    load(chunk + 3, buffer ^ 1);
    if (early) multiply(buffer);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_t + warp_t + 16 * i + 8 * half + g;
      if (token >= args.T) continue;
      float* row = args.partials + (static_cast<int64_t>(split_index) * args.T + token) * args.H;
#pragma unroll
      for (int j = 0; j < kTilesH; ++j) {
        const int col = first_h + warp_h + 8 * j + 2 * t;
        if (col < args.H) {
          *reinterpret_cast<float2*>(row + col) = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_skinny_nn(const SkinnyArgs& args, cudaStream_t stream) {
  using Traits = NnTraits;
  if (args.T == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.num_splits),
                  static_cast<unsigned>(ceil_div(args.H, Traits::kCols)),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  cudaError_t status = cudaFuncSetAttribute(
      skinny_nn_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  status = launch_kernel(
      skinny_nn_kernel, grid, Traits::kThreads, Traits::kSharedBytes, stream, args.dependent_launch, args);
  return status != cudaSuccess ? status : launch_skinny_sum(args, stream);
}

}  // namespace bitnet_ext::cuda
