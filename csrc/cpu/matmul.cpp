// The int8 x 2-bit product:
//     y[m, n] = act_scale[m] * weight_scale[n] * sum_k x_i8[m, k] * code[n, k] + bias[n]
//
// Work is cut into tasks of kTaskRows output features by kTaskTokens tokens. The weights of a task (K = 2560:
// 40 kB) stay in L1 and L2 while its tokens pass; the planes of all tokens are shared. Integer sums are
// exact, so the cut does not show in the result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/operators.h"

namespace bitnet_ext::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTaskRows = 64;
constexpr int64_t kTaskTokens = 40;        // a multiple of the tiles of 4 and of 2 tokens
constexpr int64_t kPlaneBytes = 4 << 20;   // planes that are made and used at a time
constexpr int64_t kMaxFeatures = 1 << 22;  // 3 * 128 * K must fit in int32

struct Free {
  void operator()(void* p) const {
    std::free(p);
  }
};

// Uninitialised, at the start of a cache line so that no 64-byte load of a plane crosses two.
template <typename T>
std::unique_ptr<T[], Free> scratch(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

struct Operands {
  const int8_t* x_i8;
  const uint8_t* packed;
  int64_t M, N, K;
};

// Calls use(m, n, tokens, rows, dot) for every task, from several threads; dot(acc, ld) computes its sums.
template <typename Use>
void for_each_task(const Operands& in, const Use& use) {
  if (in.M == 0) return;
  const Kernels& table = kernels();
  const int64_t stride = (in.K + kDotBlock - 1) / kDotBlock * kDotBlock;
  const int64_t fitting = std::max(kTaskTokens, kPlaneBytes / stride / kTaskTokens * kTaskTokens);
  const int64_t chunk = std::min(in.M, fitting);
  const auto planes = scratch<int8_t>(chunk * stride);
  const auto sums = scratch<int32_t>(chunk);
  const int64_t row_tasks = (in.N + kTaskRows - 1) / kTaskRows;
  for (int64_t first = 0; first < in.M; first += chunk) {
    const int64_t tokens = std::min(chunk, in.M - first);
    parallel_for(0, tokens, grain_for(stride), [&](int64_t begin, int64_t end) {
      table.make_planes(in.x_i8 + (first + begin) * in.K,
                        end - begin,
                        in.K,
                        planes.get() + begin * stride,
                        sums.get() + begin);
    });
    const int64_t token_tasks = (tokens + kTaskTokens - 1) / kTaskTokens;
    const int64_t task_bytes = kTaskRows * packed_bytes(in.K) * std::min(tokens, kTaskTokens);
    parallel_for(0, row_tasks * token_tasks, grain_for(task_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / token_tasks * kTaskRows;
        const int64_t m = task % token_tasks * kTaskTokens;
        const int64_t task_rows = std::min(kTaskRows, in.N - n);
        const int64_t task_tokens = std::min(kTaskTokens, tokens - m);
        use(first + m, n, task_tokens, task_rows, [&](int32_t* acc, int64_t ld) {
          table.dot(planes.get() + m * stride,
                    sums.get() + m,
                    task_tokens,
                    in.packed + n * packed_bytes(in.K),
                    task_rows,
                    in.K,
                    acc,
                    ld);
        });
      }
    });
  }
}

Operands check_operands(const char* op, const Tensor& x_i8, const Tensor& packed) {
  check_input(op, "x_i8", x_i8, ScalarType::Char);
  const Rows rows = check_rows(op, "x_i8", x_i8);
  check_cpu(op, "packed", packed);
  check_packed(op, packed, rows.K);
  if (rows.K > kMaxFeatures) {
    fail(op, "x_i8 must have K <= ", kMaxFeatures, ", beyond which int32 sums could overflow; got ", rows.K);
  }
  return {static_cast<const int8_t*>(x_i8.const_data_ptr()),
          static_cast<const uint8_t*>(packed.const_data_ptr()),
          rows.M,
          packed.size(0),
          rows.K};
}

// One scale a row, from one a tensor, a row or a segment of rows.
std::vector<float> scale_of_rows(const Tensor& weight_scale,
                                 int64_t N,
                                 const std::vector<int64_t>& segments) {
  const auto* scale = static_cast<const float*>(weight_scale.const_data_ptr());
  if (!segments.empty()) {
    std::vector<float> rows;
    rows.reserve(static_cast<size_t>(N));
    for (size_t s = 0; s < segments.size(); ++s) {
      rows.insert(rows.end(), static_cast<size_t>(segments[s]), scale[s]);
    }
    return rows;
  }
  if (weight_scale.numel() == 1) return std::vector<float>(static_cast<size_t>(N), scale[0]);
  return std::vector<float>(scale, scale + N);
}

Tensor int8xint2_mm_int32(const Tensor& x_i8, const Tensor& packed) {
  const Operands in = check_operands("int8xint2_mm_int32", x_i8, packed);
  std::vector<int64_t> shape = shape_of(x_i8);
  shape.back() = in.N;
  Tensor y = new_tensor(shape, ScalarType::Int);
  auto* out = static_cast<int32_t*>(y.mutable_data_ptr());
  for_each_task(
      in, [&](int64_t m, int64_t n, int64_t, int64_t, const auto& dot) { dot(out + m * in.N + n, in.N); });
  return y;
}

Tensor int8xint2_mm(const Tensor& x_i8,
                    const Tensor& act_scale,
                    const Tensor& packed,
                    const Tensor& weight_scale,
                    const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& segments,
                    ScalarType out_dtype) {
  return scaled_product("int8xint2_mm", x_i8, act_scale, packed, weight_scale, bias, segments, out_dtype);
}

}  // namespace

Tensor scaled_product(const char* op,
                      const Tensor& x_i8,
                      const Tensor& act_scale,
                      const Tensor& packed,
                      const Tensor& weight_scale,
                      const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& segments,
                      ScalarType out_dtype) {
  const Operands in = check_operands(op, x_i8, packed);
  check_input(op, "act_scale", act_scale, ScalarType::Float);
  check_numel(op, "act_scale", act_scale, in.M);
  check_cpu(op, "weight_scale", weight_scale);
  check_weight_scale(op, weight_scale, in.N, segments);
  const float* biases = optional_vector(op, "bias", bias, in.N);
  check_out_dtype(op, "out_dtype", out_dtype);

  std::vector<int64_t> shape = shape_of(x_i8);
  shape.back() = in.N;
  Tensor y = new_tensor(shape, out_dtype);
  const Kernels& table = kernels();
  const std::vector<float> row_scale = scale_of_rows(weight_scale, in.N, segments);
  const auto* token_scale = static_cast<const float*>(act_scale.const_data_ptr());
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t element_bytes = static_cast<int64_t>(y.element_size());
  for_each_task(in, [&](int64_t m, int64_t n, int64_t tokens, int64_t rows, const auto& dot) {
    int32_t acc[kTaskTokens * kTaskRows];
    dot(acc, kTaskRows);
    for (int64_t i = 0; i < tokens; ++i) {
      table.scale_row(acc + i * kTaskRows,
                      token_scale[m + i],
                      row_scale.data() + n,
                      biases ? biases + n : nullptr,
                      rows,
                      dtype_of(out_dtype),
                      out + ((m + i) * in.N + n) * element_bytes);
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CPU, m) {
  m.impl("int8xint2_mm_int32", TORCH_BOX(&int8xint2_mm_int32));
  m.impl("int8xint2_mm", TORCH_BOX(&int8xint2_mm));
}

}  // namespace bitnet_ext::cpu
