// The training forward of a ternary linear layer, and the backward of the RMSNorm in front of it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

// (y, x_i8, act_scale, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> bit_linear(const Tensor& x,
                                                      const std::vector<Tensor>& weights,
                                                      const Tensor& packed,
                                                      const Tensor& weight_scale,
                                                      const std::optional<Tensor>& bias,
                                                      const std::optional<Tensor>& norm_weight,
                                                      double norm_eps,
                                                      bool normalize,
                                                      ScalarType out_dtype,
                                                      std::string backward) {
  const char* op = "bit_linear";
  check_input(op, "x", x);
  const Rows rows = check_rows(op, "x", x);
  const std::vector<int64_t> segments = check_stack(op, weights, rows.K);
  if (norm_weight && !normalize) fail(op, "norm_weight must be absent when normalize is false; got a tensor");
  check_backward(op, backward);

  Tensor x_i8, act_scale, rstd;
  if (normalize) {
    std::tie(x_i8, act_scale, rstd) = normalize_and_quantize(op, x, "norm_weight", norm_weight, norm_eps);
  } else {
    std::tie(x_i8, act_scale) = quantize_act(op, x);
    rstd = new_tensor({0}, ScalarType::Float);
  }
  Tensor y = scaled_product(op, x_i8, act_scale, packed, weight_scale, bias, segments, out_dtype);
  return {y, x_i8, act_scale, rstd};
}

// grad_gain is summed over blocks of rows, each in row order, and the blocks in order: the blocks depend on M
// only, so the number of threads does not show. At most 256 blocks bound the partial sums to 1 kB a feature.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                             const Tensor& x,
                                             const std::optional<Tensor>& gain,
                                             const Tensor& rstd) {
  const char* op = "rms_norm_backward";
  check_input(op, "grad_y", grad_y);
  check_input(op, "x", x);
  check_same_shape(op, "grad_y", grad_y, "x", x);
  check_input(op, "rstd", rstd, ScalarType::Float);
  const auto [M, K, leading] = check_rows(op, "x", x);
  check_numel(op, "rstd", rstd, M);
  const float* gains = optional_vector(op, "gain", gain, K);

  constexpr int64_t kMinBlockRows = 16;
  constexpr int64_t kMaxBlocks = 256;
  const int64_t block_rows = std::max(kMinBlockRows, (M + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (M + block_rows - 1) / block_rows;

  const Kernels& table = kernels();
  Tensor grad_x = new_tensor(shape_of(x), x.scalar_type());
  Tensor grad_gain = new_tensor({gains ? K : 0}, ScalarType::Float);
  std::vector<float> partial(static_cast<size_t>(gains ? blocks * K : 0), 0.0f);
  const auto* dy = static_cast<const char*>(grad_y.const_data_ptr());
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  const auto* rstds = static_cast<const float*>(rstd.const_data_ptr());
  auto* out = static_cast<char*>(grad_x.mutable_data_ptr());
  const int64_t dy_row = K * static_cast<int64_t>(grad_y.element_size());
  const int64_t x_row = K * static_cast<int64_t>(x.element_size());
  parallel_for(0, blocks, grain_for(block_rows * x_row), [&, M = M, K = K](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_rows;
      const int64_t rows = std::min(block_rows, M - first);
      table.rms_norm_backward(dy + first * dy_row,
                              dtype_of(grad_y.scalar_type()),
                              in + first * x_row,
                              dtype_of(x.scalar_type()),
                              gains,
                              rstds + first,
                              rows,
                              K,
                              out + first * x_row,
                              gains ? partial.data() + b * K : nullptr);
    }
  });
  if (gains) {
    auto* sum = static_cast<float*>(grad_gain.mutable_data_ptr());
    parallel_for(0, K, grain_for(blocks * 4), [&, K = K](int64_t begin, int64_t end) {
      std::fill(sum + begin, sum + end, 0.0f);
      for (int64_t b = 0; b < blocks; ++b)
        table.add_to(sum + begin, partial.data() + b * K + begin, end - begin);
    });
  }
  return {grad_x, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("bit_linear", TORCH_BOX(&bit_linear));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace bitnet_ext::cpu
