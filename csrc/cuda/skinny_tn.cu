// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_80):
//
//   tn: out[v, h] = sum_t grad[t, v] * hidden[t, h]          the gradient of an output layer's weight
//
// Each number is two fp16 numbers (common/two_pieces.cuh), each product three. For T = 128, H = 256 and
// V = 50,257 it is 3.3 GFLOP, three times that on the tensor cores, and 26 + 51 MB. `hidden` lies in
// registers and tiles of 64 columns of grad stream by (skinny_stream.cuh). sm_90a has sm90_skinny_tn.cu.
#include "cuda/skinny_stream.cuh"

namespace bitnet_ext::cuda {
namespace {

struct TnTraits {
  static constexpr int kSteps = kTokens / 16;
  static constexpr int kTile = 64;       // columns of grad
  static constexpr int kHidden = 256;    // of a block, 32 a warp
  static constexpr int kRowBytes = 144;  // 64 fp16 and what spreads 8 rows over the banks
  static constexpr int kPlaneBytes = kTokens * kRowBytes;
  static constexpr int kBufferBytes = 2 * kPlaneBytes;
  static constexpr int kUnits = 8;  // of 16 bytes a thread copies
  static constexpr int kCopies = 2 * (kBufferBytes + kTile * 4) + kHidden * 4;
  static constexpr int kSharedBytes = kCopies + kCopyBytes<kUnits>;
};

// Warp w has columns 32 w .. of the result, lane (g, t) 4 g .. of these as operand; it loads columns 8 w ..
// of a tile of grad.
struct TnStream {
  using Traits = TnTraits;
  static constexpr int kSteps = Traits::kSteps;

  const SkinnyArgs& args;
  uint8_t* shared;
  int first_token;
  bool accumulate;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t hi[kSteps][4][2], lo[kSteps][4][2];

  __device__ __forceinline__ TnStream(const SkinnyArgs& a, uint8_t* memory, int first)
      : args(a), shared(memory), first_token(first), accumulate(a.accumulate || first > 0) {}

  // The fragments of `hidden`.
  __device__ __forceinline__ void hold() {
    const int g = lane / 4, t = lane % 4;
    const int col = 32 * warp + 4 * g;
    const auto load = [&](int step, int i) {
      const int token = first_token + 16 * step + 2 * t + i / 2 * 8 + i % 2;
      const bool exists = token < args.T && col < args.H;
      return load_4(args.hidden + static_cast<int64_t>(token) * args.H + col, exists ? 4 : 0);
    };
    uint32_t top[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 v = load(s, i);
        top[0] = max(top[0], magnitude(v.x)), top[1] = max(top[1], magnitude(v.y));
        top[2] = max(top[2], magnitude(v.z)), top[3] = max(top[3], magnitude(v.w));
      }
    }
    float up[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Scale scale(lanes_max<1, 2>(top[j]));
      up[j] = scale.up();
      if (t == 0) column_scales()[col + j] = scale.down();
    }
    forget_loads();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = load(s, 2 * r), w = load(s, 2 * r + 1);
        const float low[4] = {v.x, v.y, v.z, v.w}, high[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Pieces pieces = split(low[j], high[j], up[j]);
          hi[s][j][r] = pieces.hi, lo[s][j][r] = pieces.lo;
        }
      }
    }
  }

  __device__ __forceinline__ float* scales(int buffer) const {
    return reinterpret_cast<float*>(shared + 2 * Traits::kBufferBytes) + buffer * Traits::kTile;
  }
  __device__ __forceinline__ float* column_scales() const {
    return scales(2);
  }

  __device__ __forceinline__ void load(int tile, int slot) {
    const int v = tile * Traits::kTile + 8 * warp + lane % 2 * 4;
    const int bytes = 4 * max(0, min(4, args.V - v));
#pragma unroll
    for (int i = 0; i < Traits::kUnits; ++i) {
      const int token = first_token + 16 * i + lane / 2;
      cp_async_16_bytes(copied<Traits::kUnits>(shared + Traits::kCopies, slot, i),
                        args.grad + static_cast<int64_t>(token) * args.stride + v,
                        token < args.T ? bytes : 0);
    }
  }

  __device__ __forceinline__ void convert(int buffer, int slot) {
    float4 stage[Traits::kUnits];
#pragma unroll
    for (int i = 0; i < Traits::kUnits; ++i) {
      stage[i] = *reinterpret_cast<const float4*>(copied<Traits::kUnits>(shared + Traits::kCopies, slot, i));
    }
    uint32_t top[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      top[0] = max(top[0], magnitude(stage[i].x)), top[1] = max(top[1], magnitude(stage[i].y));
      top[2] = max(top[2], magnitude(stage[i].z)), top[3] = max(top[3], magnitude(stage[i].w));
    }
    float up[4];
    const int col = 8 * warp + lane % 2 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Scale scale(lanes_max<2, 16>(top[j]));
      up[j] = scale.up();
      if (lane < 2) scales(buffer)[col + j] = scale.down();
    }
    uint8_t* corner = shared + buffer * Traits::kBufferBytes + lane / 2 * Traits::kRowBytes + col * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 v =
          make_float4(stage[i].x * up[0], stage[i].y * up[1], stage[i].z * up[2], stage[i].w * up[3]);
      uint8_t* row = corner + 16 * i * Traits::kRowBytes;
      split_to(v, 1.0f, row, row + Traits::kPlaneBytes);
    }
  }

  __device__ __forceinline__ void multiply(int tile, int buffer) {
    if (32 * warp >= args.H) return;
    const int g = lane / 4, t = lane % 4;
    const uint8_t* corner = shared + buffer * Traits::kBufferBytes +
                            (lane / 16 * 8 + lane % 8) * Traits::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll 1
    for (int i = 0; i < Traits::kTile / 16; ++i) {
      Sums sums[4];
      uint32_t a_hi[2][4], a_lo[2][4];
      ldmatrix_x4_transposed(a_hi[0], corner + i * 32);
      ldmatrix_x4_transposed(a_lo[0], corner + i * 32 + Traits::kPlaneBytes);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s + 1 < kSteps) {
          const uint8_t* next = corner + 16 * (s + 1) * Traits::kRowBytes + i * 32;
          ldmatrix_x4_transposed(a_hi[(s + 1) % 2], next);
          ldmatrix_x4_transposed(a_lo[(s + 1) % 2], next + Traits::kPlaneBytes);
        }
        const int now = s % 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k16_f16(sums[j].large, a_hi[now], hi[s][j][0], hi[s][j][1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k16_f16(sums[j].small, a_hi[now], lo[s][j][0], lo[s][j][1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k16_f16(sums[j].small, a_lo[now], hi[s][j][0], hi[s][j][1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + g + 8 * half, v = tile * Traits::kTile + row;
        if (v >= args.V) continue;
        const float scale = scales(buffer)[row];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int col = 32 * warp + 8 * t + 4 * c;
          if (col >= args.H) continue;
          const float4 factor = *reinterpret_cast<const float4*>(column_scales() + col);
          float4* out = reinterpret_cast<float4*>(args.out + static_cast<int64_t>(v) * args.H + col);
          float4 value = make_float4(sums[0][2 * half + c] * scale * factor.x,
                                     sums[1][2 * half + c] * scale * factor.y,
                                     sums[2][2 * half + c] * scale * factor.z,
                                     sums[3][2 * half + c] * scale * factor.w);
          if (accumulate) {
            const float4 before = *out;
            value.x += before.x, value.y += before.y, value.z += before.z, value.w += before.w;
          }
          *out = value;
        }
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    skinny_tn_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles, int first_token) {
  extern __shared__ __align__(16) uint8_t shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  TnStream stream(args, shared, first_token);
  stream_tiles(stream, num_tiles);
}

}  // namespace

cudaError_t launch_skinny_tn(const SkinnyArgs& args, int max_blocks, cudaStream_t stream) {
  const int tiles = static_cast<int>(ceil_div(args.V, TnTraits::kTile));
  const dim3 grid(static_cast<unsigned>(tiles < max_blocks ? tiles : max_blocks));
  int first = 0;
  do {
    const cudaError_t status =
        launch_stream(skinny_tn_kernel, grid, TnTraits::kSharedBytes, args, stream, tiles, first);
    if (status != cudaSuccess) return status;
    first += kTokens;
  } while (first < args.T);
  return cudaSuccess;
}

}  // namespace bitnet_ext::cuda
