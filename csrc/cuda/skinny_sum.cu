// The sum of the shares of a product that is split along its contraction (skinny_nn.cu, sm90_skinny_nn.cu):
//
//   out[i] = sum_s partials[s, i]           fp32, i over T H, 4 a thread
//
// A block has 128 numbers and eight threads for four of them, each an eighth of the shares in their order;
// the eighths are added in their order. So equal inputs give equal bits, all loads of a thread are in flight
// at once, and no chain of additions is longer than an eighth of the shares and eight. 8.7 MB from L2 for
// T = 128, H = 256 and 66 shares; trips to L2 bound it.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/skinny_mm.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kQuads = 32, kParts = 8;

__global__ void __launch_bounds__(kQuads* kParts)
    skinny_sum_kernel(const float* partials, int num, int size, float* out) {
  __shared__ float4 sums[kParts][kQuads];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int quad = static_cast<int>(threadIdx.x) % kQuads, part = static_cast<int>(threadIdx.x) / kQuads;
  const int i = (static_cast<int>(blockIdx.x) * kQuads + quad) * 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const auto add = [&](const float4& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  if (i < size) {
    const int begin = num * part / kParts, end = num * (part + 1) / kParts;
#pragma unroll 9
    for (int s = begin; s < end; ++s) {
      add(*reinterpret_cast<const float4*>(partials + static_cast<int64_t>(s) * size + i));
    }
  }
  sums[part][quad] = sum;
  __syncthreads();
  if (part > 0 || i >= size) return;
#pragma unroll
  for (int other = 1; other < kParts; ++other) add(sums[other][quad]);
  *reinterpret_cast<float4*>(out + i) = sum;
}

}  // namespace

cudaError_t launch_skinny_sum(const SkinnyArgs& args, cudaStream_t stream) {
  const int size = args.T * args.H;
  return launch_kernel(skinny_sum_kernel,
                       static_cast<unsigned>(ceil_div(size, 4 * kQuads)),
                       kQuads * kParts,
                       0,
                       stream,
                       args.dependent_launch,
                       args.partials,
                       args.num_splits,
                       size,
                       args.out);
}

}  // namespace bitnet_ext::cuda
