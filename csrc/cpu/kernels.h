// The table of CPU kernels that every instruction set fills: kernels_scalar.cpp, kernels_avx2.cpp and
// kernels_avx512.cpp. This header is read by those files, which are compiled with wide instructions, so it
// holds plain data only: an inline function here could reach old CPUs in its wide form.
//
// Kernels take raw pointers, run on the calling thread and check nothing; the operator files do the rest.
// Rows are contiguous. Every instruction set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitnet_ext::cpu {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// The storage of the two 16-bit floating-point types.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Elements per fp64 partial sum of a weight, a fixed part of the definition of absmean.
constexpr int64_t kSumBlock = 4096;

// Weights (and activations) a block of the integer product covers: 64 packed bytes.
constexpr int64_t kDotBlock = 256;

// What one adam_step_ applies to every element, all as fp32.
struct AdamStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float grad_scale;
  float l2;             // added to the gradient as l2 * p; used when has_l2
  float shrink;         // p *= shrink before the step; used when has_shrink
  float step_size;      // lr / (1 - beta1^t)
  float inv_sqrt_bias;  // 1 / sqrt(1 - beta2^t)
  float eps;
  bool has_l2, has_shrink;
};

// Outputs of softmax_stats for a run of rows.
struct SoftmaxStats {
  double* lse;
  float* target_logit;
  float* mean_logit;
  float* expected_logit;
  int64_t* argmax;
};

// The terms of the loss and the outputs of cross_entropy_rows_ for a run of rows.
struct CrossEntropyRows {
  const int64_t* target;
  const float* log_marginal;  // [V] or null
  float label_smoothing, z_loss, entropy_weight, diversity_weight;
  float softcap;        // 0: none
  float scale;          // of the gradient: 1 over the number of targets
  bool write_gradient;  // over the logits, zeros over the padding
  float* lse;
  float* cross_entropy;
  float* entropy;
  float* smoothing;
  int64_t* argmax;
};

// Outputs of predicted_rows for a run of rows.
struct PredictedRows {
  double* cross_entropy;
  double* entropy;
  double* top_log_probability;
  float* logit_std;
  int64_t* argmax;
  float* mass;  // [V]: the sum of the distributions of rows whose target is not negative
};

struct Kernels {
  const char* name;

  // --- activations; false when a row holds NaN or Inf ---
  bool (*quantize_act)(const void* x, Dtype dtype, int64_t rows, int64_t K, int8_t* x_i8, float* act_scale);
  bool (*rms_norm_quantize)(const void* x,
                            Dtype dtype,
                            const float* gain,
                            double eps,
                            int64_t rows,
                            int64_t K,
                            int8_t* x_i8,
                            float* act_scale,
                            float* rstd);
  void (*dequantize_act)(
      const int8_t* x_i8, const float* act_scale, int64_t rows, int64_t K, Dtype dtype, void* y);

  // --- weights; half_scale = 0.5 * weight_scale ---
  void (*abs_sums)(const void* w, Dtype dtype, int64_t count, double* block_sums);
  void (*ternary_codes)(const void* w, Dtype dtype, int64_t count, float half_scale, int8_t* codes);
  void (*ternary_pack)(
      const void* w, Dtype dtype, int64_t rows, int64_t K, float half_scale, uint8_t* packed);
  // The three below return false when a code is invalid.
  bool (*pack)(const int8_t* codes, int64_t rows, int64_t K, uint8_t* packed);
  bool (*unpack)(const uint8_t* packed, int64_t rows, int64_t K, int8_t* codes);
  bool (*dequantize_ternary)(const uint8_t* packed,
                             const float* scale,
                             int64_t scale_stride,
                             int64_t rows,
                             int64_t K,
                             Dtype dtype,
                             void* w);

  // --- the integer product; layout of planes in generic/product.inl ---
  void (*make_planes)(const int8_t* x_i8, int64_t rows, int64_t K, int8_t* planes, int32_t* sums);
  // acc[m * ld + n] = sum_k x_i8[m, k] * code[n, k] for `tokens` rows of planes and `rows` rows of packed.
  void (*dot)(const int8_t* planes,
              const int32_t* sums,
              int64_t tokens,
              const uint8_t* packed,
              int64_t rows,
              int64_t K,
              int32_t* acc,
              int64_t ld);
  // y[n] = (acc[n] * act_scale) * weight_scale[n] + bias[n]; bias may be null.
  void (*scale_row)(const int32_t* acc,
                    float act_scale,
                    const float* weight_scale,
                    const float* bias,
                    int64_t count,
                    Dtype dtype,
                    void* y);

  // --- RMSNorm; gain may be null ---
  void (*rms_norm)(const void* x,
                   Dtype dtype,
                   const float* gain,
                   double eps,
                   int64_t rows,
                   int64_t K,
                   void* y,
                   float* rstd);
  // --- RMSNorm backward; grad_gain [K] fp32 is added to, null without a gain ---
  void (*rms_norm_backward)(const void* grad_y,
                            Dtype grad_dtype,
                            const void* x,
                            Dtype dtype,
                            const float* gain,
                            const float* rstd,
                            int64_t rows,
                            int64_t K,
                            void* grad_x,
                            float* grad_gain);
  void (*add_to)(float* sum, const float* terms, int64_t count);

  // --- optimiser ---
  double (*sum_of_squares)(const void* x, Dtype dtype, int64_t count);
  void (*adam)(float* p, const float* grad, float* m, float* v, int64_t count, const AdamStep& step);

  // --- loss ---
  void (*softmax_stats)(const void* logits,
                        Dtype dtype,
                        const int64_t* target,
                        int64_t rows,
                        int64_t V,
                        const SoftmaxStats& out);
  void (*cross_entropy_rows)(
      float* logits, int64_t rows, int64_t V, int64_t stride, const CrossEntropyRows& in);
  // sums[j] = sum over the rows whose target is not negative of exp(z_j - lse).
  void (*probability_sums)(const float* logits,
                           const int64_t* target,
                           const float* lse,
                           float softcap,
                           int64_t rows,
                           int64_t V,
                           int64_t stride,
                           float* sums);
  // exp(z_j - max) is left in place of the logits.
  void (*predicted_rows)(float* logits,
                         const int64_t* target,
                         int64_t rows,
                         int64_t V,
                         int64_t stride,
                         const PredictedRows& out);
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace bitnet_ext::cpu
