// Adam (adam.cu) for an embedding [V, H] whose rows wait for updates until something reads them.
//
//   for a row, and pending steps 0 .. n - 1 that each have a gradient by rows (row_gradient.cu):
//     u = the last step with slots[u, row] >= 0, or 0
//     the updates of steps u .. n - 1, one after the other, in u with grad[u][slots[u, row]] as the
//     gradient, or 0 without a slot, in the others with 0
//
// A slot beyond the rows of grad[u] cannot throw here: nothing is read, and the gradient is NaN, which shows
// in that row of param and of the moments.
//
// A step of few tokens reads few rows, and what Adam does to any other row needs nothing but the row. So
// before a step only the rows of its tokens are brought up to date, and behind the last of the steps all rows
// are, each element read and written once for all of them. No row needs a stamp: it was brought up to date
// before the last step that it was in. Each update is the arithmetic of adam_update.cuh, so the results are
// the bits of one step after the other.
//
// Rows of tokens: bound by latency. A block takes a token and leaves at once unless the token is the first of
// its id. A thread takes one element, because the steps are a chain, and four elements would be issued one
// after the other.
//
// All rows: 24 bytes an element once, and 25 instructions a step. For 8 steps of 50,257 x 256 that is 0.31 GB
// and, with 4 instructions a cycle on 132 multiprocessors, 152,000 cycles. A warp takes a row, 128 columns at
// a time. It asks for its next values before it computes, so that memory works meanwhile, and a thread's four
// elements are independent chains. As in adam_beside.cu the launch need not fill the GPU.
#include "cuda/adam.h"
#include "cuda/common/adam_update.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kTokenThreads = 256;  // an element a thread for H = 256
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVec = kAdamVec;
// Shared memory that nobody uses, of a launch that does not fill the GPU: with it only two blocks fit a
// multiprocessor (sm_90, 100 KB). Else the first that the kernel ahead leaves get four, others none, and the
// pass takes 240 us instead of 190 (8 steps of 50,257 x 256 beside the head's update, H200).
constexpr size_t kSpreadBytes = 38 << 10;
static_assert(kMaxPendingSteps <= 32, "a lane looks after a step");
static_assert(sizeof(AdamRowsArgs) <= 4096, "kernel parameters hold 4 KB");

// The steps that are made, for the threads of a block.
struct Steps {
  AdamFactors factors[kMaxPendingSteps];
  int count;  // those before the first whose grad_scale is NaN
};

// By one warp; the block has to wait for it.
__device__ __forceinline__ void load_steps(const AdamRowsArgs& args, Steps& steps) {
  const int s = static_cast<int>(threadIdx.x) % 32;
  bool stopped = false;
  if (s < args.steps) {
    const float grad_scale = *args.grad_scale[s];
    stopped = isnan(grad_scale);
    steps.factors[s] = adam_factors(args.rule, args.hyper + s * args.hyper_stride, grad_scale, args.decay);
  }
  const uint32_t stops = __ballot_sync(0xffffffffu, stopped);
  if (s == 0) steps.count = stops == 0 ? args.steps : __ffs(static_cast<int>(stops)) - 1;
}

struct First {
  int step;      // the first that a row waits for
  int32_t slot;  // of it, or -1
};

// By a whole warp, whose lane s has slots[s, row], or -1 beyond the steps.
__device__ __forceinline__ First first_step(int32_t slot) {
  const uint32_t with_slot = __ballot_sync(0xffffffffu, slot >= 0);
  const int step = with_slot == 0 ? 0 : 31 - __clz(static_cast<int>(with_slot));
  return {step, __shfl_sync(0xffffffffu, slot, step)};
}

__global__ void __launch_bounds__(kTokenThreads) adam_rows_kernel(const __grid_constant__ AdamRowsArgs args) {
  __shared__ Steps steps;
  // What writes ids and slots lets no kernel start early, so they can be read before the wait.
  const int64_t id = args.ids[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool mine = id >= 0 && id < args.V;
  int32_t slot = -1;
  if (mine) {
    mine = args.slots[args.steps * args.V + id] == static_cast<int32_t>(blockIdx.x);
    if (lane < args.steps) slot = args.slots[lane * args.V + id];
  }
  const First first = first_step(slot);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (!mine) return;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTokenThreads + threadIdx.x;
  const int64_t i = id * args.H + column;
  const bool inside = column < args.H;
  float p[1] = {}, g[1] = {}, m[1] = {}, v[1] = {};
  if (inside) {
    p[0] = args.param[i];
    m[0] = args.exp_avg[i];
    v[0] = args.exp_avg_sq[i];
    if (static_cast<uint32_t>(first.slot) < args.num_rows[first.step]) {
      g[0] = args.grad[first.step][first.slot * args.H + column];
    } else if (first.slot >= 0) {
      g[0] = __uint_as_float(0x7fffffffu);
    }
  }
  if (threadIdx.x < 32) load_steps(args, steps);
  __syncthreads();
  if (!inside) return;
#pragma unroll 1
  for (int s = first.step; s < steps.count; ++s) {
    adam_update(args.rule, steps.factors[s], g, p, m, v);
    g[0] = 0.0f;
  }
  args.param[i] = p[0];
  args.exp_avg[i] = m[0];
  args.exp_avg_sq[i] = v[0];
}

// A vector of each array, and a lane's share of the slots of its row.
struct Values {
  float p[kVec], m[kVec], v[kVec];
  int32_t slot;
};

// kWhole: a row is a whole number of aligned vectors. Rows, columns and elements are counted in 32 bits.
template <bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    adam_all_rows_kernel(const __grid_constant__ AdamRowsArgs args) {
  __shared__ Steps steps;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x < 32) load_steps(args, steps);
  __syncthreads();
  const int count = steps.count;
  if (count == 0) return;

  const uint32_t H = static_cast<uint32_t>(args.H), V = static_cast<uint32_t>(args.V);
  const uint32_t own = threadIdx.x % 32 * kVec;  // column of a thread within its warp's
  const uint32_t stride = gridDim.x * kWarps;
  const int32_t* lane_slots = args.slots + threadIdx.x % 32 * args.V;
  const bool has_step = static_cast<int>(threadIdx.x % 32) < args.steps;
  const auto load = [&](uint32_t row, uint32_t column, Values& out) {
    out.slot = has_step ? lane_slots[row] : -1;
    const uint32_t i = row * H + column;
    const int64_t valid = static_cast<int>(H - column);
    load_once<kWhole>(args.param + i, valid, out.p);
    load_once<kWhole>(args.exp_avg + i, valid, out.m);
    load_once<kWhole>(args.exp_avg_sq + i, valid, out.v);
  };

  uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32, begin = 0;
  if (row >= V) return;
  Values values = {};
  load(row, own, values);
#pragma unroll 1
  while (row < V) {
    uint32_t next_row = row, next_begin = begin + 32 * kVec;
    if (next_begin >= H) {
      next_row += stride;
      next_begin = 0;
    }
    Values ahead = {};
    if (next_row < V) load(next_row, next_begin + own, ahead);

    const First first = first_step(values.slot);
    const uint32_t column = begin + own;
    const int64_t valid = static_cast<int>(H - column);
    int s = first.step;
    if (first.slot >= 0 && s < count) {
      float g[kVec] = {};
      if (static_cast<uint32_t>(first.slot) < args.num_rows[s]) {
        load_once<kWhole>(args.grad[s] + static_cast<int64_t>(first.slot) * args.H + column, valid, g);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) g[j] = __uint_as_float(0x7fffffffu);
      }
      adam_update(args.rule, steps.factors[s], g, values.p, values.m, values.v);
      ++s;
    }
#pragma unroll 1
    for (; s < count; ++s) {
      const float g[kVec] = {};
      adam_update(args.rule, steps.factors[s], g, values.p, values.m, values.v);
    }
    const uint32_t i = row * H + column;
    store_once<kWhole>(args.param + i, valid, values.p);
    store_once<kWhole>(args.exp_avg + i, valid, values.m);
    store_once<kWhole>(args.exp_avg_sq + i, valid, values.v);
    values = ahead;
    row = next_row;
    begin = next_begin;
  }
}

}  // namespace

cudaError_t launch_adam_rows(const AdamRowsArgs& args, bool dependent, cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.T), static_cast<unsigned>(ceil_div(args.H, kTokenThreads)));
  const cudaError_t status = leave_shared_memory(adam_rows_kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(adam_rows_kernel, grid, kTokenThreads, 0, stream, dependent, args);
}

cudaError_t launch_adam_all_rows(const AdamRowsArgs& args, int blocks, bool dependent, cudaStream_t stream) {
  const int64_t all = ceil_div(args.V, kWarps);
  const auto kernel = args.aligned ? adam_all_rows_kernel<true> : adam_all_rows_kernel<false>;
  const cudaError_t status = leave_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel,
                       static_cast<unsigned>(blocks > 0 && blocks < all ? blocks : all),
                       kThreads,
                       blocks > 0 ? kSpreadBytes : 0,
                       stream,
                       dependent,
                       args);
}

}  // namespace bitnet_ext::cuda
