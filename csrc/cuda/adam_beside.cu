// Adam (adam.cu) for large tensors, in the shadow of other work.
//
// Bound by memory: 16 bytes read and 12 written an element. Here the launch does not fill the GPU: a few
// blocks a multiprocessor walk through all runs of 4,096 elements, and the registers and threads that they
// leave let the small kernels of another stream start at once. A full grid would make each of those wait for
// a block to end: with 1, 2 and 4 blocks a multiprocessor a step of collapse-256 takes 0.573, 0.576 and
// 0.588 ms (H200). A thread asks for its next 64 bytes, and for where the gradient of those after them is,
// before it computes: 512 threads a multiprocessor have 4.3 MB on the way on 132 of them, where 2.4 TB/s of
// reading at a latency of 1 us need 2.4. Loads and stores are marked as used once, so that they do not drive
// the activations of the other stream out of L2.
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

template <bool kWhole>
__device__ __forceinline__ void load_once(const float* p, int64_t valid, float (&out)[kVec]) {
  if constexpr (kWhole) {
    const float4 raw = __ldcs(reinterpret_cast<const float4*>(p));
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  } else {
    load_floats(p, valid, false, out);
  }
}

template <bool kWhole>
__device__ __forceinline__ void store_once(float* p, int64_t valid, const float (&values)[kVec]) {
  if constexpr (kWhole) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(values[0], values[1], values[2], values[3]));
  } else {
    store_floats(p, valid, false, values);
  }
}

// Which elements a thread takes in one of its turns, and where their gradient is.
struct Place {
  int tensor;     // -1: none
  int64_t first;  // of the tensor's elements
  int32_t slot;   // of a gradient by rows: its row, negative for none
  int32_t done;   // nothing is to be written if >= 0; looked at a turn later, when it has come
};

struct Values {
  float p[kVec], g[kVec], m[kVec], v[kVec];
};

// kWhole: all tensors and rows are whole numbers of aligned vectors, so a vector has one row.
template <bool kWhole>
__device__ __forceinline__ Place place_of(const AdamTable& table,
                                          const AdamSettings& settings,
                                          uint32_t turn) {
  Place place = {-1, 0, -1, -1};
  const uint32_t run = turn / kVectorsPerRun;
  if (run >= table.block_end[table.count - 1]) return place;
  const int t = find_entry(table.block_end, table.count, run);
  const uint32_t begin = t == 0 ? 0 : table.block_end[t - 1];
  const uint32_t vector = (turn - begin * kVectorsPerRun) * kThreads + threadIdx.x;
  place.tensor = t;
  place.first = static_cast<int64_t>(vector) * kVec;
  if (kWhole && place.first >= table.numel[t]) {
    place.first = 0;
    place.done = 0;
  } else if (kWhole && (table.flags[t] & AdamTable::kRows)) {
    const uint32_t row = static_cast<uint32_t>(place.first) / settings.row_width;
    place.slot = settings.slots[row];
    if (settings.done != nullptr) place.done = settings.done[row];
  }
  return place;
}

template <bool kWhole>
__device__ __forceinline__ void load(const AdamTable& table,
                                     const AdamSettings& settings,
                                     const Place& place,
                                     Values& out) {
  if (place.tensor < 0) return;
  const int t = place.tensor;
  const int64_t valid = table.numel[t] - place.first;
  load_once<kWhole>(table.param[t] + place.first, valid, out.p);
  load_once<kWhole>(table.exp_avg[t] + place.first, valid, out.m);
  load_once<kWhole>(table.exp_avg_sq[t] + place.first, valid, out.v);
  if (!(table.flags[t] & AdamTable::kRows)) {
    load_once<kWhole>(table.grad[t] + place.first, valid, out.g);
  } else if constexpr (kWhole) {
    if (place.slot >= 0) {
      const uint32_t column = static_cast<uint32_t>(place.first) % settings.row_width;
      load_once<true>(
          table.grad[t] + static_cast<int64_t>(place.slot) * settings.row_width + column, valid, out.g);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (j >= valid) continue;
      const uint32_t element = static_cast<uint32_t>(place.first + j), row = element / settings.row_width;
      const int32_t slot = settings.slots[row];
      if (slot < 0) continue;
      out.g[j] = table.grad[t][static_cast<int64_t>(slot) * settings.row_width +
                               (element - row * settings.row_width)];
    }
  }
}

template <bool kWhole>
__device__ __forceinline__ void store(const AdamTable& table,
                                      const AdamSettings& settings,
                                      const Place& place,
                                      const Values& values) {
  const int t = place.tensor;
  const int64_t valid = table.numel[t] - place.first;
  if (kWhole || !(table.flags[t] & AdamTable::kRows) || settings.done == nullptr) {
    store_once<kWhole>(table.param[t] + place.first, valid, values.p);
    store_once<kWhole>(table.exp_avg[t] + place.first, valid, values.m);
    store_once<kWhole>(table.exp_avg_sq[t] + place.first, valid, values.v);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const int64_t element = place.first + j;
    if (j >= valid || settings.done[static_cast<uint32_t>(element) / settings.row_width] >= 0) continue;
    table.param[t][element] = values.p[j];
    table.exp_avg[t][element] = values.m[j];
    table.exp_avg_sq[t][element] = values.v[j];
  }
}

template <bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    adam_beside_kernel(const __grid_constant__ AdamTable table,
                       const __grid_constant__ AdamSettings settings) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const float grad_scale = *settings.grad_scale;
  if (isnan(grad_scale)) return;
  AdamFactors factors = adam_factors(settings, grad_scale, false);
  const AdamFactors decayed = adam_factors(settings, grad_scale, true);

  uint32_t turn = blockIdx.x;
  Place now = place_of<kWhole>(table, settings, turn);
  Place next = place_of<kWhole>(table, settings, turn += gridDim.x);
  Values values = {};
  load<kWhole>(table, settings, now, values);
#pragma unroll 1
  while (now.tensor >= 0) {
    Values ahead = {};
    load<kWhole>(table, settings, next, ahead);
    const Place after = place_of<kWhole>(table, settings, turn += gridDim.x);
    const bool decay = table.flags[now.tensor] & AdamTable::kDecay;
    factors.coupled_decay = decay ? decayed.coupled_decay : 0.0f;
    factors.keep = decay ? decayed.keep : 1.0f;
    adam_update(settings, factors, values.g, values.p, values.m, values.v);
    if (now.done < 0) store<kWhole>(table, settings, now, values);
    values = ahead;
    now = next;
    next = after;
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
  return launch_kernel(whole ? adam_beside_kernel<true> : adam_beside_kernel<false>,
                       static_cast<unsigned>(blocks),
                       kThreads,
                       0,
                       stream,
                       dependent,
                       table,
                       settings);
}

}  // namespace bitnet_ext::cuda
