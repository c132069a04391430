// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_80):
//
//   nt: out[t, v] = sum_h hidden[t, h] * weight[v, h]        the logits of an output layer
//
// Each number is two fp16 numbers (common/two_pieces.cuh), each product three. For T = 128, H = 256 and
// V = 50,257 it is 3.3 GFLOP, three times that on the tensor cores, and 51 + 26 MB. `hidden` lies in
// registers and tiles of 32 rows of weight stream by (skinny_stream.cuh). sm_90a has sm90_skinny_nt.cu.
#include "cuda/skinny_stream.cuh"

namespace bitnet_ext::cuda {
namespace {

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

template <int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    skinny_nt_kernel(const __grid_constant__ SkinnyArgs args, int num_tiles) {
  extern __shared__ __align__(16) uint8_t shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  NtStream<kSteps> stream(args, shared);
  stream_tiles(stream, num_tiles);
}

template <int kSteps>
cudaError_t launch_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  using Traits = NtTraits<kSteps>;
  const int tiles = static_cast<int>(args.stride / Traits::kTile);
  const dim3 grid(static_cast<unsigned>(tiles < num_sms ? tiles : num_sms),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  return launch_stream(skinny_nt_kernel<kSteps>, grid, Traits::kSharedBytes, args, stream, tiles);
}

}  // namespace

cudaError_t launch_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  return args.H <= 128 ? launch_nt<8>(args, num_sms, stream) : launch_nt<16>(args, num_sms, stream);
}

}  // namespace bitnet_ext::cuda
