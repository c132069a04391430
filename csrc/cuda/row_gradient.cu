// Adds up the rows of an embedding's gradient that belong to one token.
//
//   slots[s, id] = the first t with ids[s, t] == id, or -1                                ids [S, T], slots
//   [S, V] sums[t] = sum of rows[u] over ids[u] == ids[t] if slots[ids[t]] == t, else 0          rows, sums
//   [T, H]
//
// For the few tokens of a small step, where a dense gradient [V, H] would be 99 % zeros that are written once
// and read twice (50,257 x 256: 51 MB, three times 12 us). A block takes a token and looks through all ids,
// T^2 of them in all: 16 K reads for 128 tokens, 4 M for 2,048, which is where sorting would begin to pay.
// Rows are added in the order of the tokens, without atomics. The slots need the ids alone, so those of
// several steps can be found at once and before there is a gradient.
#include "cuda/common/vec.cuh"
#include "cuda/row_gradient.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVec = 4;

__global__ void __launch_bounds__(kThreads)
    row_slots_kernel(const int64_t* __restrict__ ids, int64_t T, int64_t V, int32_t* __restrict__ slots) {
  const int64_t t = blockIdx.x;
  ids += blockIdx.y * T;
  const int64_t id = ids[t];
  bool earlier = false;
  for (int64_t u = threadIdx.x; u < t; u += kThreads) earlier |= ids[u] == id;
  const bool first = !__syncthreads_or(earlier);
  if (first && threadIdx.x == 0 && id >= 0 && id < V) slots[blockIdx.y * V + id] = static_cast<int32_t>(t);
}

__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const __grid_constant__ RowGradientArgs args) {
  __shared__ uint32_t found[kThreads / 32];
  const int64_t t = blockIdx.x;
  const int64_t id = args.ids[t];
  const bool first = id >= 0 && id < args.V && args.slots[id] == static_cast<int32_t>(t);

  // Runs of columns that the block holds in registers; H rarely exceeds one.
  for (int64_t begin = 0; begin < args.H; begin += kThreads * kVec) {
    const int64_t column = begin + static_cast<int>(threadIdx.x) * kVec;
    const int64_t valid = args.H - column;
    float sum[kVec] = {};
    if (first) {
      load_floats(args.rows + t * args.H + column, valid, args.aligned, sum);
      for (int64_t start = t + 1; start < args.T; start += kThreads) {
        const int64_t u = start + threadIdx.x;
        const uint32_t mine = __ballot_sync(0xffffffffu, u < args.T && args.ids[u] == id);
        __syncthreads();  // all have read the round before
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = mine;
        __syncthreads();
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) {
          for (uint32_t bits = found[warp]; bits != 0; bits &= bits - 1) {
            const int64_t same = start + warp * 32 + __ffs(static_cast<int>(bits)) - 1;
            float row[kVec];
            load_floats(args.rows + same * args.H + column, valid, args.aligned, row);
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum[i] += row[i];
          }
        }
      }
    }
    store_floats(args.sums + t * args.H + column, valid, args.aligned, sum);
  }
}

}  // namespace

cudaError_t launch_row_slots(
    const int64_t* ids, int64_t S, int64_t T, int64_t V, int32_t* slots, cudaStream_t stream) {
  const cudaError_t status =
      cudaMemsetAsync(slots, 0xff, sizeof(int32_t) * static_cast<size_t>(S * V), stream);
  if (status != cudaSuccess || S * T == 0) return status;
  const dim3 grid(static_cast<unsigned>(T), static_cast<unsigned>(S));
  row_slots_kernel<<<grid, kThreads, 0, stream>>>(ids, T, V, slots);
  return cudaGetLastError();
}

cudaError_t launch_sum_rows(const RowGradientArgs& args, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  sum_rows_kernel<<<static_cast<unsigned>(args.T), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace bitnet_ext::cuda
