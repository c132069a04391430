// One Adam step over many tensors, with the sums of |param| that the ternary quantiser needs next.
//
//   g = grad * grad_scale;   coupled decay: g += wd * p;   decoupled decay: p *= 1 - lr * wd
//   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   p -= (lr / bc1) * m / (sqrt(v) / sqrt(bc2) + eps)
//
// Bound by memory: 16 bytes read and 12 written an element, once. A block handles 4,096 elements of one
// tensor, 16 a thread in four 16-byte accesses of each array; of a ternary weight it handles the elements of
// one partial sum of quantize_weight.cu and adds them in the same order, so the scale is the same bits as if
// the weight were read again. lr, the decay and the bias corrections are read from the device, so that a
// captured graph can be replayed with other values; a NaN as grad_scale (grad_norm.cu) means: no step. The
// gradient of one tensor may be given as rows (row_gradient.cu): other rows have gradient 0, which is not
// read. A slot beyond these rows cannot throw here: nothing is read, and the gradient is NaN, which shows in
// that row of param and of the moments.
#include "cuda/adam.h"
#include "cuda/common/adam_update.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_table.cuh"
#include "cuda/common/ternary_weight.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kThreads = kWeightThreads;
constexpr int kVec = kAdamVec;  // as abs_partial reads float32
static_assert(sizeof(AdamTable) + sizeof(AdamSettings) <= 4096, "kernel parameters hold 4 KB");

// The gradient of kVec elements from i on, of a tensor whose gradient is that of some rows. `aligned` says
// that a row is a whole number of vectors.
__device__ __forceinline__ void load_row_gradient(const float* grad,
                                                  const AdamSettings& settings,
                                                  int64_t i,
                                                  int64_t valid,
                                                  bool aligned,
                                                  float (&g)[kVec]) {
  const uint32_t width = settings.row_width;
  float absent = 0.0f;  // the gradient where nothing is read
  const auto at = [&](int64_t place) -> const float* {
    const uint32_t element = static_cast<uint32_t>(place);  // a 64-bit division would take 70 instructions
    const uint32_t row = element / width;
    const int32_t slot = settings.slots[row];
    absent = slot < 0 ? 0.0f : __uint_as_float(0x7fffffffu);
    if (static_cast<uint32_t>(slot) >= settings.num_rows) return nullptr;
    return grad + static_cast<int64_t>(slot) * width + (element - row * width);
  };
  if (aligned) {
    const float* source = at(i);
    if (source != nullptr) {
      load_floats(source, valid, true, g);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) g[j] = absent;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float* source = j < valid ? at(i + j) : nullptr;
      g[j] = j >= valid ? 0.0f : source == nullptr ? absent : *source;
    }
  }
}

// store_floats of fp32. The instruction keeps 16 bytes together: behind arithmetic without branches nvcc
// melts the stores of both cases into one of single floats.
__device__ __forceinline__ void store_vector(float* p,
                                             int64_t valid,
                                             bool aligned,
                                             const float (&out)[kVec]) {
  if (aligned && valid >= kVec) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "f"(out[0]),
                 "f"(out[1]),
                 "f"(out[2]),
                 "f"(out[3])
                 : "memory");
  } else {
    store_floats(p, valid, false, out);
  }
}

__global__ void __launch_bounds__(kThreads)
    adam_step_kernel(const __grid_constant__ AdamTable table, const __grid_constant__ AdamSettings settings) {
  __shared__ double scratch[kThreads / 32];
  const int t = find_entry(table.block_end, table.count, blockIdx.x);
  const uint32_t block = blockIdx.x - (t == 0 ? 0 : table.block_end[t - 1]);
  const int64_t begin = static_cast<int64_t>(block) * table.run[t];
  const int64_t end = min(begin + table.run[t], table.numel[t]);
  const bool aligned = table.flags[t] & AdamTable::kAligned;
  const bool decay = table.flags[t] & AdamTable::kDecay;
  const bool ternary = table.flags[t] & AdamTable::kTernary;
  const bool rows = table.flags[t] & AdamTable::kRows;

  wait_for_previous_kernel();
  allow_next_kernel();
  const float grad_scale = *settings.grad_scale;
  if (isnan(grad_scale)) {
    if (ternary) {
      const double sum = abs_partial(table.param[t], begin, end, aligned, scratch);
      if (threadIdx.x == 0) settings.abs_sums[table.first_sum[t] + block] = sum;
    }
    return;
  }
  const AdamFactors factors = adam_factors(settings.rule, settings.hyper, grad_scale, decay);

  double sums[kVec] = {};
#pragma unroll 1  // 2 and 4 are no faster (H200), with more registers
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * kVec; i < end; i += kThreads * kVec) {
    const int64_t valid = end - i;
    float p[kVec], g[kVec], m[kVec], v[kVec];
    load_floats(table.param[t] + i, valid, aligned, p);
    if (rows) {
      load_row_gradient(table.grad[t], settings, i, valid, aligned, g);
    } else {
      load_floats(table.grad[t] + i, valid, aligned, g);
    }
    load_floats(table.exp_avg[t] + i, valid, aligned, m);
    load_floats(table.exp_avg_sq[t] + i, valid, aligned, v);
    adam_update(settings.rule, factors, g, p, m, v);
    store_vector(table.param[t] + i, valid, aligned, p);
    store_vector(table.exp_avg[t] + i, valid, aligned, m);
    store_vector(table.exp_avg_sq[t] + i, valid, aligned, v);
    if (ternary) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[j] += j < valid ? static_cast<double>(fabsf(p[j])) : 0.0;
    }
  }
  if (!ternary) return;
#pragma unroll
  for (int j = 1; j < kVec; ++j) sums[0] += sums[j];
  const double sum = block_sum<kThreads>(sums[0], scratch);
  if (threadIdx.x == 0) settings.abs_sums[table.first_sum[t] + block] = sum;
}

}  // namespace

cudaError_t launch_adam_step(const AdamTable& table,
                             const AdamSettings& settings,
                             bool dependent,
                             cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  const cudaError_t status = leave_shared_memory(adam_step_kernel);
  if (status != cudaSuccess) return status;
  return launch_kernel(
      adam_step_kernel, table.block_end[table.count - 1], kThreads, 0, stream, dependent, table, settings);
}

}  // namespace bitnet_ext::cuda
