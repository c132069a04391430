// The sum of the squares of many tensors, and gradient clipping by the global norm in two launches.
//
//   norm = sqrt(sum_i sum g_i^2);   grad_scale = min(1, max_norm / (norm + 1e-6))
//
// Bound by memory: 4 bytes an element read, once. The squares are summed in fp64, where squares of fp32 are
// exact, over fixed runs of elements, then a tensor, then over all, always in one order: equal tensors give
// equal bits. The sums of the tensors say which of them holds NaN or Inf.
//
// A norm that is not finite goes into a latch, with the step and the sums of the tensors, and from then on
// grad_scale is NaN, which makes the optimiser change nothing (adam.cu): the parameters stay those of the
// last good step however many steps are in flight before the host looks.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_table.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/grad_norm.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 4;
static_assert(sizeof(SquareSumTable) + 64 <= 4096, "kernel parameters hold 4 KB");
static_assert(sizeof(ClipTable) + sizeof(ClipArgs) <= 4096, "kernel parameters hold 4 KB");

template <typename scalar_t>
__device__ __forceinline__ double square_sum(const void* data, int64_t begin, int64_t end) {
  const scalar_t* tensor = static_cast<const scalar_t*>(data);
  const bool aligned = is_aligned(tensor, kVec * sizeof(scalar_t));
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * kVec; i < end; i += kThreads * kVec) {
    float values[kVec];
    load_floats(tensor + i, end - i, aligned, values);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      sum = fma(static_cast<double>(values[j]), static_cast<double>(values[j]), sum);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const __grid_constant__ SquareSumTable table, double* __restrict__ partials) {
  __shared__ double scratch[kThreads / 32];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int t = find_entry(table.block_end, table.count, blockIdx.x);
  const uint32_t first_block = t == 0 ? 0 : table.block_end[t - 1];
  const int64_t run = square_run(table.numel[t]);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - first_block) * run;
  const int64_t end = min(begin + run, table.numel[t]);
  double sum;
  switch (static_cast<DType>(table.dtype[t])) {
    case DType::kBFloat16:
      sum = square_sum<__nv_bfloat16>(table.data[t], begin, end);
      break;
    case DType::kFloat16:
      sum = square_sum<__half>(table.data[t], begin, end);
      break;
    default:
      sum = square_sum<float>(table.data[t], begin, end);
  }
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

constexpr int kAddThreads = 1024;

// sum of values[0 .. count), the same in every thread; read from L2, where other blocks have just put them.
template <int kBlockThreads>
__device__ __forceinline__ double sum_in_block(const double* values, int64_t count, double* scratch) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kBlockThreads) sum += __ldcg(values + i);
  return block_sum<kBlockThreads>(sum, scratch);
}

__global__ void __launch_bounds__(kAddThreads)
    add_partials_kernel(const double* __restrict__ partials, int64_t count, double* __restrict__ out) {
  __shared__ double scratch[kAddThreads / 32];
  const double sum = sum_in_block<kAddThreads>(partials, count, scratch);
  if (threadIdx.x == 0) *out = sum;
}

constexpr int kClipThreads = 128;

// A block a tensor; the block that ends last adds up the tensors, always in the same order.
__global__ void __launch_bounds__(kClipThreads)
    clip_kernel(const __grid_constant__ ClipTable table, const __grid_constant__ ClipArgs args) {
  __shared__ double scratch[kClipThreads / 32];
  __shared__ bool is_last;
  wait_for_previous_kernel();
  allow_next_kernel();
  const uint32_t begin = blockIdx.x == 0 ? 0 : table.partials_end[blockIdx.x - 1];
  const bool known = args.known != nullptr && args.first_tensor + blockIdx.x == args.known_tensor;
  const double own = sum_in_block<kClipThreads>(
      known ? args.known : args.partials + begin,
      known ? args.num_known : static_cast<int64_t>(table.partials_end[blockIdx.x]) - begin,
      scratch);
  if (threadIdx.x == 0) {
    args.square_sums[args.first_tensor + blockIdx.x] = own;
    __threadfence();  // the sum before the ticket
    unsigned* ticket = reinterpret_cast<unsigned*>(args.latch + 1);
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // back to 0 by the last
  }
  __syncthreads();
  if (!is_last || args.first_tensor + table.count < args.tensors) return;

  __threadfence();  // the ticket before the sums
  const double total = sum_in_block<kClipThreads>(args.square_sums, args.tensors, scratch);
  const float norm = static_cast<float>(sqrt(total));
  const bool finite = isfinite(norm);
  const bool latched = args.latch[0] >= 0.0;
  __syncthreads();  // all have read the latch
  if (!finite && !latched) {
    for (int64_t i = threadIdx.x; i < args.tensors; i += kClipThreads) {
      args.latch[2 + i] = __ldcg(args.square_sums + i);
    }
  }
  if (threadIdx.x == 0) {
    if (!finite && !latched) args.latch[0] = static_cast<double>(*args.step);
    *args.norm = norm;
    const float scale = fminf(__frcp_rn(norm + 1e-6f) * args.max_norm, 1.0f);
    *args.grad_scale = finite && !latched ? scale : __uint_as_float(0x7fffffffu);
  }
}

}  // namespace

cudaError_t launch_square_sums(const SquareSumTable& table,
                               double* partials,
                               bool dependent,
                               cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  const cudaError_t status = leave_shared_memory(square_sums_kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(
      square_sums_kernel, table.block_end[table.count - 1], kThreads, 0, stream, dependent, table, partials);
}

cudaError_t launch_add_partials(const double* partials, int64_t count, double* out, cudaStream_t stream) {
  add_partials_kernel<<<1, kAddThreads, 0, stream>>>(partials, count, out);
  return cudaGetLastError();
}

cudaError_t launch_clip(const ClipTable& table, const ClipArgs& args, bool dependent, cudaStream_t stream) {
  const cudaError_t status = leave_shared_memory(clip_kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(
      clip_kernel, static_cast<unsigned>(table.count), kClipThreads, 0, stream, dependent, table, args);
}

}  // namespace bitnet_ext::cuda
