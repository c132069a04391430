// fp32 product of few tokens with a tall matrix on fp16 tensor cores, with the accuracy of fp32 (sm_90a):
//
//   nn: out[t, h] = sum_v grad[t, v] * weight[v, h]          the gradient of an output layer's input
//
// The contraction is as long as the vocabulary: a block has 128 columns h x 128 tokens of the result,
// transposed, and a share of V, which it walks in chunks of 64 (sm90_skinny.cuh). Two warpgroups load 64
// columns of weight each into fragments and multiply; a third one cuts the chunk of grad into its pieces, in
// shared memory, three chunks deep behind copies that are up to three chunks further. The shares' sums are
// added in their order by launch_skinny_sum.
//
// T = 128, H = 256, V = 50,257: 66 shares x 2, 12 chunks a block. A chunk is 1,536 clocks of the tensor cores
// and 64 kB of memory or L2, 2,800 clocks at 4.2 TB/s and 1.8 GHz (grad once from memory, once from L2):
// bytes bound it.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ld_global.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/ptx/register_count.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/skinny_mm.h"
#include "cuda/sm90_skinny.cuh"

// Older architectures leave the kernel's body out and what it uses unused.
#pragma nv_diag_suppress 177

namespace bitnet_ext::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kSkinnyTokens);
static_assert(kSkinnyChunk == kSm90SkinnyNnChunk, "whole chunks are shared out");

// kAhead: chunks of weight that are brought to L2 before they are loaded, 0 for none; kStages of pieces;
// kSlots of copies of grad on their way.
template <int kAhead_, int kStages_, int kSlots_>
struct Sm90NnTraits {
  static constexpr int kAhead = kAhead_, kStages = kStages_, kSlots = kSlots_;
  static constexpr int kConsumers = 2, kWarpgroup = 128;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kCols = 64 * kConsumers;  // h of a block
  static constexpr int kUnits = 16;              // of 16 bytes a thread copies of a chunk
  static constexpr int kScales = kStages * kSkinnyChunkBytes;
  static constexpr int kCopies = kScales + kStages * kTokens * 4;
  static constexpr int kBarriers = kCopies + kSlots * kUnits * kWarpgroup * 16;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024, "the stages fit shared memory");
  // A block has 168 a thread when it starts, the multiple of 8 that three warpgroups can have.
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 3 * 168,
                "nothing waits for registers");
};

// A block's place in the ring of stages.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Cuts chunks of grad: of each 4 tokens, lane 8 i + j has numbers 4 j .. and 32 + 4 j .. of token i, which
// become the 16 bytes that hold 8 j .. 8 j + 7 of the contraction.
template <typename Traits>
__device__ __forceinline__ void produce(
    const SkinnyArgs& args, uint8_t* shared, uint64_t* full, uint64_t* empty, int begin, int end) {
  const int thread = static_cast<int>(threadIdx.x) % Traits::kWarpgroup, lane = thread % 32, j = lane % 8;
  const int first_row = thread / 32 * 32 + lane / 8;
  // A thread reads back what it copied itself, so the copies need no barrier.
  const auto copied = [&](int slot, int unit) {
    return shared + Traits::kCopies + ((slot * Traits::kUnits + unit) * Traits::kWarpgroup + thread) * 16;
  };
  // Tokens beyond T are not stored: the last one of the lane, or of all, stands for them.
  const int first_t = static_cast<int>(blockIdx.z) * kTokens + first_row;
  const float* first = args.grad + static_cast<int64_t>(min(first_t, args.T - 1)) * args.stride + 4 * j;
  const int rows = (args.T - 1 - first_t) / 4;  // below it, the lane has another one
  const auto load = [&](int chunk, int slot) {
    if (chunk < end) {
      const int first_v = chunk * kSkinnyChunk, left = args.V - first_v - 4 * j;
      const int low = 4 * max(0, min(4, left)), high = 4 * max(0, min(4, left - 32));
      const float* row = first + first_v;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        cp_async_16_bytes(copied(slot, 2 * i), row, low);
        cp_async_16_bytes(copied(slot, 2 * i + 1), row + 32, high);
        if (i < rows) row += 4 * args.stride;
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < Traits::kSlots; ++slot) load(begin + slot, slot);
  RingPosition<Traits::kStages> ring;
  int slot = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    cp_async_wait<Traits::kSlots - 1>();
    mbarrier_wait(empty + ring.stage, ring.phase ^ 1);
    uint8_t* plane = shared + ring.stage * kSkinnyChunkBytes;
    float* scales = reinterpret_cast<float*>(shared + Traits::kScales) + ring.stage * kTokens;
#pragma unroll 1
    for (int i = 0; i < 8; i += 2) {
      // Two tokens side by side, as shared memory keeps the compiler from doing.
      float x[2][8];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 four = *reinterpret_cast<const float4*>(copied(slot, 2 * i + k));
        x[k / 2][k % 2 * 4] = four.x, x[k / 2][k % 2 * 4 + 1] = four.y;
        x[k / 2][k % 2 * 4 + 2] = four.z, x[k / 2][k % 2 * 4 + 3] = four.w;
      }
      uint32_t top[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float largest = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) largest = larger_magnitude(largest, x[n][k]);
        top[n] = lanes_max<1, 4>(__float_as_uint(largest));
      }
      Pieces pieces[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float up = Scale(top[n]).up();
#pragma unroll
        for (int k = 0; k < 4; ++k) pieces[n][k] = split(x[n][2 * k], x[n][2 * k + 1], up);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = first_row + 4 * (i + n);
        const Pieces(&of)[4] = pieces[n];
        uint8_t* to = plane + swizzled(row, j);
        *reinterpret_cast<uint4*>(to) = make_uint4(of[0].hi, of[1].hi, of[2].hi, of[3].hi);
        *reinterpret_cast<uint4*>(to + kSkinnyPlaneBytes) =
            make_uint4(of[0].lo, of[1].lo, of[2].lo, of[3].lo);
        if (j == 0) scales[row] = Scale(top[n]).down();
      }
    }
    fence_async_proxy();  // the products read through the async proxy
    mbarrier_arrive(full + ring.stage);
    load(chunk + Traits::kSlots, slot);
    if (++slot == Traits::kSlots) slot = 0;
    ring.next();
  }
}

// A warpgroup's 64 columns of weight times the chunk of grad; of warp w, rows g and g + 8 of the fragments
// are columns 16 w + 2 g and 16 w + 2 g + 1.
template <typename Traits>
__device__ __forceinline__ void consume(
    const SkinnyArgs& args, uint8_t* shared, uint64_t* full, uint64_t* empty, int begin, int end) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int col = blockIdx.y * Traits::kCols + thread / 32 * 16 + 2 * g;
  // x[..][4 s + 2 r + e] is number 16 s + 8 r + 2 t + e of the contraction, which produce() fills with number
  // 32 (t / 2) + 8 s + 4 r + 2 (t % 2) + e of the chunk.
  const int offset = t / 2 * 32 + t % 2 * 2;
  LeftChunk x;
  // Rows beyond V meet zeros of grad, so the last row stands for them; columns beyond H are not stored.
  const float* first = args.weight + min(col, args.H - 2);
  const auto load = [&](int chunk) {
    if (chunk >= end) return;
    const int first_v = chunk * kSkinnyChunk, last = args.V - 1 - first_v;
    const float* corner = first + static_cast<int64_t>(first_v) * args.H;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float2 pair = load_once_float2(corner + min(offset + k / 2 * 4 + k % 2, last) * args.H);
      x[0][k] = pair.x, x[1][k] = pair.y;
    }
  };
  // Whole rows of weight, each of the blocks of a share its part of them
  const auto fetch = [&](int chunk) {
    if (Traits::kAhead == 0 || thread != 0 || blockIdx.z > 0 || chunk >= end) return;
    const int part = kSkinnyChunk / static_cast<int>(gridDim.y);  // of 1 or 2
    const int first_v = chunk * kSkinnyChunk + static_cast<int>(blockIdx.y) * part;
    const int rows = min(part, args.V - first_v);
    if (rows <= 0) return;
    prefetch_bulk(args.weight + static_cast<int64_t>(first_v) * args.H,
                  static_cast<uint32_t>(rows * args.H * 4));
  };

#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) fetch(begin + i);
  wait_for_previous_kernel();
  load(begin);
  float total[64] = {};
  RingPosition<Traits::kStages> ring;
  for (int chunk = begin; chunk < end; ++chunk) {
    fetch(chunk + Traits::kAhead);
    const Scale scales[2] = {row_scale(x[0]), row_scale(x[1])};
    const float up[2] = {scales[0].up(), scales[1].up()}, down[2] = {scales[0].down(), scales[1].down()};
    mbarrier_wait(full + ring.stage, ring.phase);
    float sums[64];
    multiply_chunk(
        sums, x, up, wgmma_descriptor(shared + ring.stage * kSkinnyChunkBytes), [&] { load(chunk + 1); });
    add_chunk(total,
              sums,
              down,
              reinterpret_cast<const float*>(shared + Traits::kScales) + ring.stage * kTokens,
              lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + ring.stage);
    ring.next();
  }

  if (col >= args.H) return;
  const int first_t = blockIdx.z * kTokens + 2 * t;
  float* out = args.partials + static_cast<int64_t>(blockIdx.x) * args.T * args.H + col;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = first_t + 8 * j + e;
      if (token >= args.T) continue;
      *reinterpret_cast<float2*>(out + static_cast<int64_t>(token) * args.H) =
          make_float2(total[4 * j + e], total[4 * j + 2 + e]);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_skinny_nn_kernel(const __grid_constant__ SkinnyArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];  // as the swizzle needs it
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Traits::kBarriers);
  uint64_t* empty = full + Traits::kStages;
  const int chunks = (args.V + kSkinnyChunk - 1) / kSkinnyChunk;
  const int splits = static_cast<int>(gridDim.x), split_index = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * split_index / splits);
  const int end = static_cast<int>(static_cast<int64_t>(chunks) * (split_index + 1) / splits);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(full + stage, Traits::kWarpgroup);
      mbarrier_init(empty + stage, Traits::kConsumers * Traits::kWarpgroup / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= Traits::kConsumers * Traits::kWarpgroup) {
    lower_registers<Traits::kProducerRegisters>();
    wait_for_previous_kernel();
    allow_next_kernel();
    produce<Traits>(args, shared, full, empty, begin, end);
  } else {
    raise_registers<Traits::kConsumerRegisters>();
    consume<Traits>(args, shared, full, empty, begin, end);
  }
#else
  __trap();  // never launched: the host checks that code for this device was compiled
#endif
}

template <typename Traits>
cudaError_t launch(const SkinnyArgs& args, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.num_splits),
                  static_cast<unsigned>(ceil_div(args.H, Traits::kCols)),
                  static_cast<unsigned>(ceil_div(args.T, kTokens)));
  cudaError_t status = cudaFuncSetAttribute(
      sm90_skinny_nn_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  status = launch_kernel(sm90_skinny_nn_kernel<Traits>,
                         grid,
                         Traits::kThreads,
                         Traits::kSharedBytes,
                         stream,
                         args.dependent_launch,
                         args);
  return status != cudaSuccess ? status : launch_skinny_sum(args, stream);
}

}  // namespace

cudaError_t launch_sm90_skinny_nn(const SkinnyArgs& args, cudaStream_t stream) {
  return launch<Sm90NnTraits<2, 3, 3>>(args, stream);
}

}  // namespace bitnet_ext::cuda
