// What skinny_nt.cu and skinny_tn.cu share: tiles of a tall operand that stream through a block.
//
// A block's warps hold the fragments of `hidden` (128 x 256, both pieces) in 128 registers a thread and
// stream tiles of the tall operand, whose pieces go through shared memory, twice buffered: every tile is read
// from shared memory once a warp, and `hidden` never. Tensor cores chop where an addition rounds, so hi hi
// has sums apart from the small products.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/two_pieces.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma_float.cuh"
#include "cuda/skinny_mm.h"

namespace bitnet_ext::cuda {

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

template <typename... Params, typename... Args>
cudaError_t launch_stream(void (*kernel)(Params...),
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

}  // namespace bitnet_ext::cuda
