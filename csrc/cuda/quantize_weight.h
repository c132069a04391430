// A latent weight to ternary codes, as int8, packed or prepacked, with the scale of the whole matrix.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.h"

namespace bitnet_ext::cuda {

struct QuantizeWeightArgs {
  const void* weight;  // [N, K] of `dtype`
  DType dtype;
  int64_t N, K;
  double* partials;  // [absmean_partials(N * K)], workspace
  // Exactly one of the three is given, the others are null.
  int8_t* codes;        // [N, K]
  uint8_t* packed;      // [N, ceil(K / 4)]
  void* prepacked;      // blocks of csrc/prepacked.h, 16-byte aligned
  float* weight_scale;  // []
};

// How many fp64 partial sums the first pass writes: a function of the element count only, so that the scale
// does not depend on the device.
constexpr int64_t absmean_partials(int64_t numel) {
  constexpr int64_t kElementsPerPartial = 4096;
  constexpr int64_t kMaxPartials = 1024;
  const int64_t wanted = (numel + kElementsPerPartial - 1) / kElementsPerPartial;
  return wanted < kMaxPartials ? wanted : kMaxPartials;
}

// Elements of each of these sums but the last.
constexpr int64_t absmean_run(int64_t numel) {
  const int64_t partials = absmean_partials(numel);
  const int64_t wanted = (numel + partials - 1) / partials;
  return (wanted + 7) / 8 * 8;
}

cudaError_t launch_quantize_weight(const QuantizeWeightArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda
