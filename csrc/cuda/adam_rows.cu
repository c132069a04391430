// Adam (adam.cu) for some rows of an embedding [V, H], so that they can be read before the rest is up to
// date.
//
//   for each id of ids [T]: the update of param[id], with grad[slots[id]] as its gradient, or 0 without a
//   slot
//
// Bound by latency: T rows of H, for 128 x 256 one megabyte. A block takes a token and leaves at once unless
// the token is the first of its id, which place [V] (row_gradient.cu) knows.
#include "cuda/adam.h"
#include "cuda/common/adam_update.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 64;  // one vector a thread for H = 256
constexpr int kVec = kAdamVec;

__global__ void __launch_bounds__(kThreads) adam_rows_kernel(const __grid_constant__ AdamRowsArgs args,
                                                             const __grid_constant__ AdamSettings settings) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t id = args.ids[blockIdx.x];
  const float grad_scale = *settings.grad_scale;
  if (id < 0 || id >= args.V || isnan(grad_scale)) return;
  const int32_t slot = settings.slots[id];
  if (args.place[id] != static_cast<int32_t>(blockIdx.x)) return;
  const AdamFactors factors = adam_factors(settings, grad_scale, args.decay);
  for (int64_t column = static_cast<int>(threadIdx.x) * kVec; column < args.H; column += kThreads * kVec) {
    const int64_t valid = args.H - column, i = id * args.H + column;
    float p[kVec], g[kVec] = {}, m[kVec], v[kVec];
    load_floats(args.param + i, valid, args.aligned, p);
    load_floats(args.exp_avg + i, valid, args.aligned, m);
    load_floats(args.exp_avg_sq + i, valid, args.aligned, v);
    if (slot >= 0) {
      load_floats(args.grad + static_cast<int64_t>(slot) * args.H + column, valid, args.aligned, g);
    }
    adam_update(settings, factors, g, p, m, v);
    store_floats(args.param + i, valid, args.aligned, p);
    store_floats(args.exp_avg + i, valid, args.aligned, m);
    store_floats(args.exp_avg_sq + i, valid, args.aligned, v);
  }
}

}  // namespace

cudaError_t launch_adam_rows(const AdamRowsArgs& args,
                             const AdamSettings& settings,
                             bool dependent,
                             cudaStream_t stream) {
  if (args.T == 0) return cudaSuccess;
  return launch_kernel(
      adam_rows_kernel, static_cast<unsigned>(args.T), kThreads, 0, stream, dependent, args, settings);
}

}  // namespace bitnet_ext::cuda
