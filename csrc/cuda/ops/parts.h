// Steps that several operators share: the quantisers and the product, with their allocations.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch_context.h"
#include "prepacked.h"

namespace bitnet_ext::cuda {

inline std::vector<int64_t> with_last(std::vector<int64_t> leading, int64_t size) {
  leading.push_back(size);
  return leading;
}

// (x_i8, act_scale, rstd); rstd is an empty [0] tensor without the norm. With `delta`, of the shape of x and
// checked, the rows are those of x + delta, which is written to `sum`.
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const LaunchContext& context,
                                                 const Tensor& x,
                                                 bool normalize,
                                                 const char* gain_arg,
                                                 const std::optional<Tensor>& gain,
                                                 double eps,
                                                 const Tensor* delta = nullptr,
                                                 const Tensor* sum = nullptr);

// (x_i8, act_scale, rstd, first_rstd): the rows of quantize_rows with another norm in front, in one launch.
// `sum` is written without delta too.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_norm_pair(const LaunchContext& context,
                                                              const Tensor& x,
                                                              const Tensor& first_gain,
                                                              double first_eps,
                                                              const std::optional<Tensor>& gain,
                                                              double eps,
                                                              const std::optional<Tensor>& delta,
                                                              const Tensor& sum);

enum class WeightForm { kCodes, kPacked, kPrepacked };

// (codes int8 [N, K], packed uint8 [N, ceil(K / 4)] or prepacked int32 [ceil(N / 16), ceil(K / 128), 32, 4];
// weight_scale [])
std::tuple<Tensor, Tensor> quantize_weight(const LaunchContext& context,
                                           const Tensor& weight,
                                           WeightForm form);

// Canonical packed [N, ceil(K / 4)] -> prepacked.
Tensor prepack(const LaunchContext& context, const Tensor& packed, int64_t K);

// The scaled product [.., N] of `out_dtype`.
Tensor scaled_product(const LaunchContext& context,
                      const Tensor& x_i8,
                      const Tensor& act_scale,
                      const Tensor& prepacked,
                      int64_t N,
                      const Tensor& weight_scale,
                      const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& segments,
                      ScalarType out_dtype,
                      bool weight_is_constant);

}  // namespace bitnet_ext::cuda
