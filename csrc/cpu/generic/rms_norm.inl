// y = (x * rstd) * gain, rounded to x's type.
template <typename T>
void rms_norm(const T* x, const float* gain, double eps, int64_t rows, int64_t K, T* y, float* rstd) {
  for (int64_t m = 0; m < rows; ++m) {
    const T* row = x + m * K;
    rstd[m] = rstd_of(row, eps, K);
    const VecF scale = splat(rstd[m]);
    for (int64_t k = 0; k < K; k += 16) {
      const VecF v = load_some(row + k, K - k) * scale;
      store_some(y + m * K + k, gain ? v * load_some(gain + k, K - k) : v, K - k);
    }
  }
}

// Backward of y = x * rstd * gain. With g = grad_y * gain and xhat = x * rstd:
//     grad_x = rstd * (g - xhat * mean_k(g * xhat)),   grad_gain += grad_y * xhat.
// Bound by memory; the second pass over a row finds it in L1 or L2.

template <bool kHasGain, typename G, typename T>
void rms_norm_backward_rows(const G* grad_y,
                            const T* x,
                            const float* gain,
                            const float* rstd,
                            int64_t rows,
                            int64_t K,
                            T* grad_x,
                            float* grad_gain) {
  for (int64_t m = 0; m < rows; ++m) {
    const VecF scale = splat(rstd[m]);
    const auto normalized = [&](int64_t k) { return load_some(x + m * K + k, K - k) * scale; };
    const auto through_gain = [&](VecF dy, int64_t k) {
      return kHasGain ? dy * load_some(gain + k, K - k) : dy;
    };
    VecD sum = zero_double();
    for (int64_t k = 0; k < K; k += 16) {
      sum = add_product(sum, through_gain(load_some(grad_y + m * K + k, K - k), k), normalized(k));
    }
    const VecF mean = splat(static_cast<float>(reduce_sum(sum) / static_cast<double>(K)));
    for (int64_t k = 0; k < K; k += 16) {
      const VecF dy = load_some(grad_y + m * K + k, K - k);
      const VecF xhat = normalized(k);
      store_some(grad_x + m * K + k, scale * (through_gain(dy, k) - xhat * mean), K - k);
      if (kHasGain) store_some(grad_gain + k, load_some(grad_gain + k, K - k) + dy * xhat, K - k);
    }
  }
}

template <typename G, typename T>
void rms_norm_backward(const G* grad_y,
                       const T* x,
                       const float* gain,
                       const float* rstd,
                       int64_t rows,
                       int64_t K,
                       T* grad_x,
                       float* grad_gain) {
  if (gain) {
    rms_norm_backward_rows<true>(grad_y, x, gain, rstd, rows, K, grad_x, grad_gain);
  } else {
    rms_norm_backward_rows<false>(grad_y, x, gain, rstd, rows, K, grad_x, grad_gain);
  }
}

void add_to(float* sum, const float* terms, int64_t count) {
  for (int64_t k = 0; k < count; k += 16) {
    store_some(sum + k, load_some(sum + k, count - k) + load_some(terms + k, count - k), count - k);
  }
}
