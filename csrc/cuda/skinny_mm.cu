// fp32 products of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32:
//
//   nt: out[t, v] = sum_h hidden[t, h] * weight[v, h]        the logits of an output layer
//   nn: out[t, h] = sum_v grad[t, v] * weight[v, h]          the gradient of its input
//   tn: out[v, h] = sum_t grad[t, v] * hidden[t, h]          the gradient of its weight
//
// A number times a power of two that brings the largest of its row (of the contraction, in this tile) to
// 2^14 .. 2^15 is the sum of two fp16 numbers to 22 bits, or to 2^-39 of that largest one. Three of the four
// products of such pairs, hi hi + hi lo + lo hi, are therefore as good as fp32, and cost half of what the
// same scheme costs in TF32 and half of six products of three bf16 pieces. The powers of two are found where
// the numbers are loaded anyway, and every row of a tile has its own, so nothing is assumed about magnitudes.
// Tensor cores chop where an addition rounds: hi hi has sums apart from the small products, and nn, whose
// contraction is long, adds each 32 terms in fp32.
//
// For T = 128, H = 256 and V = 50,257 each is 3.3 GFLOP, three times that on the tensor cores, and 51 + 26
// MB. nt and tn: a block's warps hold the fragments of `hidden` (128 x 256, both pieces) in 128 registers a
// thread
//   and stream tiles of the tall operand, whose pieces go through shared memory, twice buffered.
// nn: a block has 128 tokens x 128 columns of the result and a share of V; the shares' sums are added in
// their
//   order by a second kernel.
#include <cuda_fp16.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma_float.cuh"
#include "cuda/skinny_mm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = static_cast<int>(kSkinnyTokens);

// --- two pieces --------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t magnitude(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}
__device__ __forceinline__ uint32_t magnitude(const float4& v) {
  return max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
}

// The largest of the lanes whose numbers differ in the bits kFirst .. kLast, each a power of two.
template <int kFirst, int kLast>
__device__ __forceinline__ uint32_t lanes_max(uint32_t v) {
#pragma unroll
  for (int bit = kFirst; bit <= kLast; bit <<= 1) v = max(v, __shfl_xor_sync(kFullWarp, v, bit));
  return v;
}

// A power of two and its inverse for numbers of which `top` is the largest magnitude. Both are normal; what
// is below 2^-112 is not brought up to 2^14 any more, Inf and NaN count as 2^128.
struct Scale {
  uint32_t exponent;
  __device__ __forceinline__ explicit Scale(uint32_t top) : exponent(min(268u - (top >> 23), 253u)) {}
  __device__ __forceinline__ float up() const {
    return __uint_as_float(exponent << 23);
  }
  __device__ __forceinline__ float down() const {
    return __uint_as_float((254u - exponent) << 23);
  }
};

struct Pieces {
  uint32_t hi, lo;
};

__device__ __forceinline__ Pieces split(float x, float y, float scale) {
  // |x - hi| is at most 8; Inf - Inf would spread NaN where PyTorch has Inf.
  constexpr float kAboveAllRemainders = 64.0f;
  x *= scale, y *= scale;
  const __half2 hi = __floats2half2_rn(x, y);
  const float2 back = __half22float2(hi);
  const __half2 lo =
      __floats2half2_rn(fminf(x - back.x, kAboveAllRemainders), fminf(y - back.y, kAboveAllRemainders));
  return {*reinterpret_cast<const uint32_t*>(&hi), *reinterpret_cast<const uint32_t*>(&lo)};
}

// Four neighbours to two places in shared memory.
__device__ __forceinline__ void split_to(const float4& v, float scale, uint8_t* hi, uint8_t* lo) {
  const Pieces first = split(v.x, v.y, scale), second = split(v.z, v.w, scale);
  *reinterpret_cast<uint2*>(hi) = make_uint2(first.hi, second.hi);
  *reinterpret_cast<uint2*>(lo) = make_uint2(first.lo, second.lo);
}

// The first `valid` of four neighbours; `p` is 16-byte aligned.
__device__ __forceinline__ float4 load_4(const float* p, int valid) {
  if (valid >= 4) return *reinterpret_cast<const float4*>(p);
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (valid > 0) v.x = p[0];
  if (valid > 1) v.y = p[1];
  if (valid > 2) v.z = p[2];
  return v;
}

// hi hi apart from the two small products.
struct Sums {
  float large[4] = {}, small[4] = {};
  __device__ __forceinline__ void add(const uint32_t (&a_hi)[4],
                                      const uint32_t (&a_lo)[4],
                                      const uint32_t (&b_hi)[2],
                                      const uint32_t (&b_lo)[2]) {
    mma_m16n8k16_f16(large, a_hi, b_hi[0], b_hi[1]);
    mma_m16n8k16_f16(small, a_hi, b_lo[0], b_lo[1]);
    mma_m16n8k16_f16(small, a_lo, b_hi[0], b_hi[1]);
  }
  __device__ __forceinline__ float operator[](int i) const {
    return large[i] + small[i];
  }
};

// Streams tiles blockIdx.x, + gridDim.x, ...: while one is multiplied from shared memory, the next one's
// pieces are written beside it and the one after that is on its way to registers.
template <typename Stream>
__device__ __forceinline__ void stream_tiles(Stream& stream, int num_tiles) {
  const int stride = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x);
  if (tile >= num_tiles) return;
  stream.load(tile);
  stream.convert(0);
  if (tile + stride < num_tiles) stream.load(tile + stride);
  __syncthreads();
  for (int buffer = 0; tile < num_tiles; tile += stride, buffer ^= 1) {
    // Half of the warps of each scheduler convert while the others multiply.
    const bool next = tile + stride < num_tiles, after = tile + 2 * stride < num_tiles;
    const bool early = threadIdx.x / 128 == 0;
    if (next && early) {
      stream.convert(buffer ^ 1);
      if (after) stream.load(tile + 2 * stride);
    }
    stream.multiply(tile, buffer);
    if (next && !early) {
      stream.convert(buffer ^ 1);
      if (after) stream.load(tile + 2 * stride);
    }
    __syncthreads();
  }
}

// --- nt ----------------------------------------------------------------------------------------------------

template <int kSteps>
struct NtTraits {
  static constexpr int kCols = 16 * kSteps;  // of hidden, zeros beyond H
  static constexpr int kTile = 32;           // rows of weight
  static constexpr int kPlaneBytes = 2 * kCols;
  static constexpr int kRowBytes = 2 * kPlaneBytes + 16;  // 8 rows start in 8 different groups of 4 banks
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kSharedBytes = 2 * (kBufferBytes + kTile * 4);
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
  float4 stage[4][kParts];

  __device__ __forceinline__ NtStream(const SkinnyArgs& a, uint8_t* memory) : args(a), shared(memory) {
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
#pragma unroll
      for (int s = 0; s < 2 * kSteps; ++s) {
        const float2 pair = load(8 * s);
        top = max(top, max(magnitude(pair.x), magnitude(pair.y)));
      }
      const Scale scale(lanes_max<1, 2>(top));
      down[half] = scale.down();
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

  __device__ __forceinline__ void load(int tile) {
    const int first_v = tile * Traits::kTile + 4 * warp;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int col = part * 128 + lane * 4;
        const bool exists = first_v + r < args.V && col < args.H;
        stage[r][part] =
            load_4(args.weight + static_cast<int64_t>(first_v + r) * args.H + col, exists ? 4 : 0);
      }
    }
  }

  __device__ __forceinline__ void convert(int buffer) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t top = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) top = max(top, magnitude(stage[r][part]));
      const Scale scale(__reduce_max_sync(kFullWarp, top));
      uint8_t* row = shared + buffer * Traits::kBufferBytes + (4 * warp + r) * Traits::kRowBytes + lane * 8;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        split_to(stage[r][part], scale.up(), row + part * 256, row + part * 256 + Traits::kPlaneBytes);
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
      for (int j = 0; j < kTiles; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, corner + j * 8 * Traits::kRowBytes + s * 32);
        sums[j].add(hi[s], lo[s], {b[0], b[1]}, {b[2], b[3]});
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
  static constexpr int kSharedBytes = 2 * (kBufferBytes + kTile * 4) + kHidden * 4;
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
  float4 stage[8];

  __device__ __forceinline__ TnStream(const SkinnyArgs& a, uint8_t* memory, int first)
      : args(a), shared(memory), first_token(first), accumulate(first > 0) {
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

  __device__ __forceinline__ void load(int tile) {
    const int v = tile * Traits::kTile + 8 * warp + lane % 2 * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = first_token + 16 * i + lane / 2;
      stage[i] =
          load_4(args.grad + static_cast<int64_t>(token) * args.stride + v, token < args.T ? args.V - v : 0);
    }
  }

  __device__ __forceinline__ void convert(int buffer) {
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
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t a_hi[4], a_lo[4];
        ldmatrix_x4_transposed(a_hi, corner + 16 * s * Traits::kRowBytes + i * 32);
        ldmatrix_x4_transposed(a_lo, corner + 16 * s * Traits::kRowBytes + i * 32 + Traits::kPlaneBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j].add(a_hi, a_lo, hi[s][j], lo[s][j]);
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

// --- nn ----------------------------------------------------------------------------------------------------

struct NnTraits {
  // 16 warps of 32 x 32 fit 128 registers each; 8 of 32 x 64 do not fit 255.
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kLanes = 32 / kWarps;  // that share a row of a warp's columns of weight
  static constexpr int kWarpCols = 32;        // of a warp's tile of 32 tokens
  static constexpr int kChunk = 32;           // of V
  static constexpr int kCols = 128;           // of the result
  static constexpr int kRowBytesA = 144;      // 32 fp16 of each piece, and padding
  static constexpr int kRowBytesB = 272;      // 128 fp16, and padding
  static constexpr int kBytesA = kTokens * kRowBytesA;
  static constexpr int kPlaneBytesB = kChunk * kRowBytesB;
  static constexpr int kBufferBytes = kBytesA + 2 * kPlaneBytesB;
  static constexpr int kScales = kTokens + kCols;
  static constexpr int kSharedBytes = 2 * (kBufferBytes + kScales * 4);
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

  float4 grad[kLanes], weight[kLanes];
  const auto load = [&](int chunk) {
    const int first_v = chunk * Traits::kChunk;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int token = first_t + 4 * kLanes * warp + 4 * i + lane / 8, v = first_v + lane % 8 * 4;
      grad[i] =
          load_4(args.grad + static_cast<int64_t>(token) * args.stride + v, token < args.T ? args.V - v : 0);
      const int row = first_v + 32 / kLanes * i + lane / kLanes;
      const int col = first_h + 4 * kLanes * warp + lane % kLanes * 4;
      weight[i] = load_4(args.weight + static_cast<int64_t>(row) * args.H + col,
                         row < args.V && col < args.H ? 4 : 0);
    }
  };
  const auto scales = [&](int buffer) {
    return reinterpret_cast<float*>(shared + 2 * Traits::kBufferBytes) + buffer * Traits::kScales;
  };
  const auto convert = [&](int buffer) {
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

  if (begin < end) {
    load(begin);
    convert(0);
    if (begin + 1 < end) load(begin + 1);
  }
  __syncthreads();
  for (int chunk = begin; chunk < end; ++chunk) {
    const int buffer = (chunk - begin) % 2;
    const bool early = warp < Traits::kWarps / 2;
    if (early && chunk + 1 < end) {
      convert(buffer ^ 1);
      if (chunk + 2 < end) load(chunk + 2);
    }
    multiply(buffer);
    if (!early && chunk + 1 < end) {
      convert(buffer ^ 1);
      if (chunk + 2 < end) load(chunk + 2);
    }
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

__global__ void __launch_bounds__(128)
    skinny_sum_kernel(const float* partials, int num, int size, float* out) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 16
  for (int s = 0; s < num; ++s) sum += partials[static_cast<int64_t>(s) * size + i];
  out[i] = sum;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...),
                   dim3 grid,
                   int threads,
                   int shared_bytes,
                   const SkinnyArgs& args,
                   cudaStream_t stream,
                   Args... rest) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel,
                       grid,
                       static_cast<unsigned>(threads),
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
  return launch(skinny_nt_kernel<kSteps>, grid, kThreads, Traits::kSharedBytes, args, stream, tiles);
}

}  // namespace

cudaError_t launch_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  return args.H <= 128 ? launch_nt<8>(args, num_sms, stream) : launch_nt<16>(args, num_sms, stream);
}

cudaError_t launch_skinny_tn(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  const int tiles = static_cast<int>(ceil_div(args.V, TnTraits::kTile));
  const dim3 grid(static_cast<unsigned>(tiles < num_sms ? tiles : num_sms));
  int first = 0;
  do {
    const cudaError_t status =
        launch(skinny_tn_kernel, grid, kThreads, TnTraits::kSharedBytes, args, stream, tiles, first);
    if (status != cudaSuccess) return status;
    first += kTokens;
  } while (first < args.T);
  return cudaSuccess;
}

cudaError_t launch_skinny_nn(const SkinnyArgs& args, cudaStream_t stream) {
  using Traits = NnTraits;
  if (args.T == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.num_splits),
                  static_cast<unsigned>(ceil_div(args.H, Traits::kCols)),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  const cudaError_t status =
      launch(skinny_nn_kernel, grid, Traits::kThreads, Traits::kSharedBytes, args, stream);
  if (status != cudaSuccess) return status;
  const int size = args.T * args.H;
  return launch_kernel(skinny_sum_kernel,
                       static_cast<unsigned>(ceil_div(size, 128)),
                       128,
                       0,
                       stream,
                       args.dependent_launch,
                       args.partials,
                       args.num_splits,
                       size,
                       args.out);
}

}  // namespace bitnet_ext::cuda
