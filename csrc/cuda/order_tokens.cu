// The order in which the weight gradient adds up the tokens, and the bound of each stage of 128 of them:
//
//   order[place] = token, by class; class(m) = the power of two that max_n |g[m, n] act_scale[m]| lies below,
//                  counted down from the largest token's, at most 15
//   stage_bound[s] = 2^-shift x the power of two above the largest
//
// int8_gradient.h says what they are for. One block, bound by latency: a stable counting sort, so that the
// order depends on nothing but the magnitudes.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/int8_gradient.h"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/quantize_grad.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kClasses = 16;
// Stages of the largest products whose sum is sure to fit int32.
constexpr int kMostStages = 2147000000 / (128 * 127 * kStageTokens);

// The power of two that a token's magnitude lies below, counted down from the largest token's.
__device__ __forceinline__ int class_of(uint32_t bits, uint32_t largest) {
  return min(kClasses - 1, static_cast<int>(largest >> 23) - static_cast<int>(bits >> 23));
}

// Every warp has a run of tokens; counts by class and warp, their prefix sums, then places.
__global__ void __launch_bounds__(kThreads) order_tokens_kernel(const QuantizeGradArgs args) {
  __shared__ int counts[kClasses * kWarps];
  __shared__ int class_begin[kClasses + 1];
  __shared__ uint32_t largest_of[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int M = static_cast<int>(args.M);
  const int places = static_cast<int>(padded_tokens(args.M)), run = places / kWarps;
  const int begin = warp * run, end = min(M, begin + run);

  wait_for_previous_kernel();
  allow_next_kernel();
  uint32_t largest = 0;
  for (int m = begin + lane; m < end; m += 32) largest = max(largest, args.token_max[m]);
  largest = block_max<kThreads>(largest, largest_of);
  for (int i = threadIdx.x; i < kClasses * kWarps; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int m = begin + lane; m < end; m += 32) {
    atomicAdd(counts + class_of(args.token_max[m], largest) * kWarps + warp, 1);
  }
  __syncthreads();
  if (warp < kClasses) {  // prefix sums over the warps of a class
    const int mine = counts[warp * kWarps + lane];
    int sum = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += other;
    }
    counts[warp * kWarps + lane] = sum - mine;
    if (lane == 31) class_begin[warp + 1] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    class_begin[0] = 0;
    for (int c = 0; c < kClasses; ++c) class_begin[c + 1] += class_begin[c];
  }
  __syncthreads();
  for (int first = begin; first < end; first += 32) {
    const int m = first + lane;
    const bool valid = m < end;
    const unsigned active = __ballot_sync(kFullWarp, valid);
    if (!valid) break;
    const int c = class_of(args.token_max[m], largest);
    const unsigned same = __match_any_sync(active, c);
    int* next = counts + c * kWarps + warp;
    const int place = class_begin[c] + *next + __popc(same & ((1u << lane) - 1));
    __syncwarp(active);
    if ((same >> lane >> 1) == 0) *next += __popc(same);  // the last of them
    __syncwarp(active);
    args.order[place] = m;
  }
  for (int j = M + static_cast<int>(threadIdx.x); j < places; j += kThreads) args.order[j] = -1;

  // Bounds of the stages. A stage may go down to its first token's class, as long as no sum can leave int32:
  // all before it, in its units, and all that follows it, unreduced, both counted in stages. From a stage to
  // the next twice the former plus the latter grows by 1, so a class is gone down to at its first whole stage
  // or never, and each stage finds its bound from the classes alone.
  const float top = largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu)
                                           : exp2f(static_cast<float>(static_cast<int>(largest >> 23) - 126));
  const int stages = places / kStageTokens;
  for (int s = threadIdx.x; s < stages; s += kThreads) {
    int shift = 0, before = 0, last = 0;
    for (int c = 1; c < kClasses; ++c) {
      const int first = (class_begin[c] + kStageTokens - 1) / kStageTokens;
      before += first - last;
      last = first;
      if (first > s || 2 * before + stages - first > kMostStages) break;
      before *= 2;
      shift = c;
    }
    args.stage_bound[s] = ldexpf(top, -shift);
  }
}

}  // namespace

cudaError_t launch_order_tokens(const QuantizeGradArgs& args, bool dependent, cudaStream_t stream) {
  return launch_kernel(order_tokens_kernel, 1, kThreads, 0, stream, dependent, args);
}

}  // namespace bitnet_ext::cuda
