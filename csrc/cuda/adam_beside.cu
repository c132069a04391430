// Adam (adam.cu) for large tensors, in the shadow of other work.
//
// Bound by memory: 16 bytes read and 12 written an element. Here the launch does not fill the GPU: a few
// blocks a multiprocessor walk through all runs of 4,096 elements, and the registers and threads that they
// leave let the small kernels of another stream start at once. A full grid would make each of those wait for
// a block to end: with 1, 2 and 4 blocks a multiprocessor a step of collapse-256 takes 0.474, 0.485 and
// 0.509 ms (H200). A thread asks for its next 64 bytes before it computes: 256 threads a multiprocessor have
// 2.2 MB on the way on 132 of them, where 2.4 TB/s of reading at a latency of 1 us need 2.4. Loads and stores
// are marked as used once, so that they do not drive the activations of the other stream out of L2.
#include "cuda/adam.h"
#include "cuda/common/adam_update.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_table.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = kAdamVec;
constexpr int kRun = 4096;  // adam_run of a tensor without sums
constexpr int kVectorsPerRun = kRun / (kThreads * kVec);
static_assert(adam_run(1, false) == kRun, "the table counts runs of this size");

// Which elements a thread takes in one of its turns.
struct Place {
  int tensor;     // -1: none
  int64_t first;  // of the tensor's elements, or beyond them
};

struct Values {
  float p[kVec], g[kVec], m[kVec], v[kVec];
};

__device__ __forceinline__ Place place_of(const AdamTable& table, uint32_t turn) {
  const uint32_t run = turn / kVectorsPerRun;
  if (run >= table.block_end[table.count - 1]) return {-1, 0};
  const int t = find_entry(table.block_end, table.count, run);
  const uint32_t begin = t == 0 ? 0 : table.block_end[t - 1];
  const uint32_t vector = (turn - begin * kVectorsPerRun) * kThreads + threadIdx.x;
  return {t, static_cast<int64_t>(vector) * kVec};
}

template <bool kWhole>
__device__ __forceinline__ void load(const AdamTable& table, const Place& place, Values& out) {
  if (place.tensor < 0) return;
  const int t = place.tensor;
  const int64_t valid = table.numel[t] - place.first;
  load_once<kWhole>(table.param[t] + place.first, valid, out.p);
  load_once<kWhole>(table.grad[t] + place.first, valid, out.g);
  load_once<kWhole>(table.exp_avg[t] + place.first, valid, out.m);
  load_once<kWhole>(table.exp_avg_sq[t] + place.first, valid, out.v);
}

template <bool kWhole>
__device__ __forceinline__ void store(const AdamTable& table, const Place& place, const Values& values) {
  const int t = place.tensor;
  const int64_t valid = table.numel[t] - place.first;
  store_once<kWhole>(table.param[t] + place.first, valid, values.p);
  store_once<kWhole>(table.exp_avg[t] + place.first, valid, values.m);
  store_once<kWhole>(table.exp_avg_sq[t] + place.first, valid, values.v);
}

// kWhole: all tensors are whole numbers of aligned vectors.
template <bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    adam_beside_kernel(const __grid_constant__ AdamTable table,
                       const __grid_constant__ AdamSettings settings) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const float grad_scale = *settings.grad_scale;
  if (isnan(grad_scale)) return;
  AdamFactors factors = adam_factors(settings.rule, settings.hyper, grad_scale, false);
  const AdamFactors decayed = adam_factors(settings.rule, settings.hyper, grad_scale, true);

  uint32_t turn = blockIdx.x;
  Place now = place_of(table, turn);
  Values values = {};
  load<kWhole>(table, now, values);
#pragma unroll 1
  while (now.tensor >= 0) {
    const Place next = place_of(table, turn += gridDim.x);
    Values ahead = {};
    load<kWhole>(table, next, ahead);
    const bool decay = table.flags[now.tensor] & AdamTable::kDecay;
    factors.coupled_decay = decay ? decayed.coupled_decay : 0.0f;
    factors.keep = decay ? decayed.keep : 1.0f;
    adam_update(settings.rule, factors, values.g, values.p, values.m, values.v);
    store<kWhole>(table, now, values);
    values = ahead;
    now = next;
  }
}

}  // namespace

cudaError_t launch_adam_beside(
    const AdamTable& table, const AdamSettings& settings, int blocks, bool dependent, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  bool whole = true;
  for (int t = 0; t < table.count; ++t) {
    whole &= (table.flags[t] & AdamTable::kAligned) != 0 && table.numel[t] % kVec == 0;
  }
  const auto kernel = whole ? adam_beside_kernel<true> : adam_beside_kernel<false>;
  const cudaError_t status = leave_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(
      kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, dependent, table, settings);
}

}  // namespace bitnet_ext::cuda
