// fp32 products of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32:
//
//   nt: out[t, v] = sum_h hidden[t, h] * weight[v, h]        the logits of an output layer
//   tn: out[v, h] = sum_t grad[t, v] * hidden[t, h]          the gradient of its weight
//
// Each number is two fp16 numbers (common/two_pieces.cuh), each product three. For T = 128, H = 256 and
// V = 50,257 one is 3.3 GFLOP, three times that on the tensor cores, and 51 + 26 MB. A block's warps hold the
// fragments of `hidden` (128 x 256, both pieces) in 128 registers a thread and stream tiles of the tall
// operand, whose pieces go through shared memory, twice buffered: every tile is read from shared memory once
// a warp, and `hidden` never. Tensor cores chop where an addition rounds, so hi hi has sums apart from the
// small products.
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

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = static_cast<int>(kSkinnyTokens);

// Keeps the compiler from holding what it loaded before for when it is loaded again.
__device__ __forceinline__ void forget_loads() {
  asm volatile("" ::: "memory");
}

// hi hi apart from the two small products.
struct Sums {
  float large[4] = {}, small[4] = {};
  __device__ __forceinline__ float operator[](int i) const {
    return large[i] + small[i];
  }
};

// Streams tiles blockIdx.x, + gridDim.x, ...: while one is multiplied from shared memory, the next one's
// pieces are written beside it, and the two after that are on their way to shared memory.
template <typename Stream>
__device__ __forceinline__ void stream_tiles(Stream& stream, int num_tiles) {
  const int stride = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x);
  const auto load = [&](int index, int slot) {
    if (index < num_tiles) stream.load(index, slot);
    cp_async_commit();
  };
  load(tile, 0);
  load(tile + stride, 1);
  stream.hold();
  cp_async_wait<1>();
  stream.convert(0, 0);
  load(tile + 2 * stride, 0);
  __syncthreads();
  for (int buffer = 0; tile < num_tiles; tile += stride, buffer ^= 1) {
    // Half of the warps of each scheduler convert while the others multiply.
    const bool next = tile + stride < num_tiles, early = threadIdx.x / 128 == 0;
    if (!early) stream.multiply(tile, buffer);
    if (next) {
      cp_async_wait<1>();
      stream.convert(buffer ^ 1, buffer ^ 1);
    }
    load(tile + 3 * stride, buffer ^ 1);
    if (early) stream.multiply(tile, buffer);
    __syncthreads();
  }
}

// A thread's copies of a tile, in one of two slots: it reads back what it copied itself, so no barrier is
// needed.
template <int kUnits>
__device__ __forceinline__ uint8_t* copied(uint8_t* copies, int slot, int unit) {
  return copies + ((slot * kUnits + unit) * kThreads + threadIdx.x) * 16;
}
template <int kUnits>
constexpr int kCopyBytes = 2 * kUnits * kThreads * 16;

// --- nt ----------------------------------------------------------------------------------------------------

template <int kSteps>
struct NtTraits {
  static constexpr int kCols = 16 * kSteps;  // of hidden, zeros beyond H
  static constexpr int kTile = 32;           // rows of weight
  static constexpr int kPlaneBytes = 2 * kCols;
  static constexpr int kRowBytes = 2 * kPlaneBytes + 16;  // 8 rows start in 8 different groups of 4 banks
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kUnits = kCols / 32;  // of 16 bytes a thread copies
  static constexpr int kCopies = 2 * (kBufferBytes + kTile * 4);
  static constexpr int kSharedBytes = kCopies + kCopyBytes<kUnits>;
};

// Warp w has tokens 16 w .. of the block's 128, and loads rows 4 w .. 4 w + 3 of a tile.
template <int kSteps>
struct NtStream {
  using Traits = NtTraits<kSteps>;
  static constexpr int kParts = Traits::kCols / 128;

  const SkinnyArgs& args;
  uint8_t* shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_t;
  uint32_t hi[kSteps][4], lo[kSteps][4];
  float down[2];

  __device__ __forceinline__ NtStream(const SkinnyArgs& a, uint8_t* memory) : args(a), shared(memory) {}

  // The fragments of `hidden`.
  __device__ __forceinline__ void hold() {
    const int g = lane / 4, t = lane % 4;
    first_t = blockIdx.y * kTokens + 16 * warp + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = first_t + 8 * half < args.T;
      const float* row = args.hidden + static_cast<int64_t>(first_t + 8 * half) * args.H + 2 * t;
      const auto load = [&](int col) {
        if (!exists || col >= args.H) return make_float2(0.0f, 0.0f);
        return *reinterpret_cast<const float2*>(row + col);
      };
      // Read twice, because as fp32 numbers they would need twice the registers.
      uint32_t top = 0;
#pragma unroll 8
      for (int s = 0; s < 2 * kSteps; ++s) {
        const float2 pair = load(8 * s);
        top = max(top, max(magnitude(pair.x), magnitude(pair.y)));
      }
      const Scale scale(lanes_max<1, 2>(top));
      down[half] = scale.down();
      forget_loads();
#pragma unroll
      for (int s = 0; s < 2 * kSteps; ++s) {
        const float2 pair = load(8 * s);
        const Pieces pieces = split(pair.x, pair.y, scale.up());
        hi[s / 2][s % 2 * 2 + half] = pieces.hi;
        lo[s / 2][s % 2 * 2 + half] = pieces.lo;
      }
    }
  }

  __device__ __forceinline__ float* scales(int buffer) const {
    return reinterpret_cast<float*>(shared + 2 * Traits::kBufferBytes) + buffer * Traits::kTile;
  }

  __device__ __forceinline__ void load(int tile, int slot) {
    const int first_v = tile * Traits::kTile + 4 * warp;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int col = part * 128 + lane * 4;
        const bool exists = first_v + r < args.V && col < args.H;
        cp_async_16(copied<Traits::kUnits>(shared + Traits::kCopies, slot, r * kParts + part),
                    args.weight + static_cast<int64_t>(first_v + r) * args.H + col,
                    exists);
      }
    }
  }

  __device__ __forceinline__ void convert(int buffer, int slot) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float4 values[kParts];
      uint32_t top = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        values[part] = *reinterpret_cast<const float4*>(
            copied<Traits::kUnits>(shared + Traits::kCopies, slot, r * kParts + part));
        top = max(top, magnitude(values[part]));
      }
      const Scale scale(__reduce_max_sync(kFullWarp, top));
      uint8_t* row = shared + buffer * Traits::kBufferBytes + (4 * warp + r) * Traits::kRowBytes + lane * 8;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        split_to(values[part], scale.up(), row + part * 256, row + part * 256 + Traits::kPlaneBytes);
      }
      if (lane == 0) scales(buffer)[4 * warp + r] = scale.down();
    }
  }

  __device__ __forceinline__ void multiply(int tile, int buffer) {
    if (first_t - lane / 4 >= args.T) return;
    constexpr int kTiles = Traits::kTile / 8;
    Sums sums[kTiles];
    const uint8_t* corner = shared + buffer * Traits::kBufferBytes + lane % 8 * Traits::kRowBytes +
                            lane / 16 * Traits::kPlaneBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        // In this order of two by two the compiler reads fragments ahead without running out of registers.
        uint32_t b[2][4];
        ldmatrix_x4(b[0], corner + j * 8 * Traits::kRowBytes + s * 32);
        ldmatrix_x4(b[1], corner + (j + 1) * 8 * Traits::kRowBytes + s * 32);
        mma_m16n8k16_f16(sums[j].small, lo[s], b[0][0], b[0][1]);
        mma_m16n8k16_f16(sums[j + 1].small, lo[s], b[1][0], b[1][1]);
        mma_m16n8k16_f16(sums[j].large, hi[s], b[0][0], b[0][1]);
        mma_m16n8k16_f16(sums[j + 1].large, hi[s], b[1][0], b[1][1]);
        mma_m16n8k16_f16(sums[j].small, hi[s], b[0][2], b[0][3]);
        mma_m16n8k16_f16(sums[j + 1].small, hi[s], b[1][2], b[1][3]);
      }
    }
    const int t = lane % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int v = tile * Traits::kTile + 8 * j + 2 * t;
      const float2 scale = *reinterpret_cast<const float2*>(scales(buffer) + 8 * j + 2 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (first_t + 8 * half >= args.T) continue;
        float* out = args.out + static_cast<int64_t>(first_t + 8 * half) * args.stride + v;
        *reinterpret_cast<float2*>(out) = make_float2(sums[j][2 * half] * down[half] * scale.x,
                                                      sums[j][2 * half + 1] * down[half] * scale.y);
      }
    }
  }
};

// --- tn ----------------------------------------------------------------------------------------------------

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

template <int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    skinny_nt_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles) {
  extern __shared__ __align__(16) uint8_t shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  NtStream<kSteps> stream(args, shared);
  stream_tiles(stream, num_tiles);
}

__global__ void __launch_bounds__(kThreads, 1)
    skinny_tn_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles, int first_token) {
  extern __shared__ __align__(16) uint8_t shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  TnStream stream(args, shared, first_token);
  stream_tiles(stream, num_tiles);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...),
                   dim3 grid,
                   int shared_bytes,
                   const SkinnyArgs& args,
                   cudaStream_t stream,
                   Args... rest) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel,
                       grid,
                       kThreads,
                       static_cast<size_t>(shared_bytes),
                       stream,
                       args.dependent_launch,
                       args,
                       rest...);
}

template <int kSteps>
cudaError_t launch_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  using Traits = NtTraits<kSteps>;
  const int tiles = static_cast<int>(args.stride / Traits::kTile);
  const dim3 grid(static_cast<unsigned>(tiles < num_sms ? tiles : num_sms),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  return launch(skinny_nt_kernel<kSteps>, grid, Traits::kSharedBytes, args, stream, tiles);
}

}  // namespace

cudaError_t launch_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  return args.H <= 128 ? launch_nt<8>(args, num_sms, stream) : launch_nt<16>(args, num_sms, stream);
}

cudaError_t launch_skinny_tn(const SkinnyArgs& args, int max_blocks, cudaStream_t stream) {
  const int tiles = static_cast<int>(ceil_div(args.V, TnTraits::kTile));
  const dim3 grid(static_cast<unsigned>(tiles < max_blocks ? tiles : max_blocks));
  int first = 0;
  do {
    const cudaError_t status =
        launch(skinny_tn_kernel, grid, TnTraits::kSharedBytes, args, stream, tiles, first);
    if (status != cudaSuccess) return status;
    first += kTokens;
  } while (first < args.T);
  return cudaSuccess;
}

}  // namespace bitnet_ext::cuda
