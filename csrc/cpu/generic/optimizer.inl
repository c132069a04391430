// Adam and the sum of squares for its gradient clipping. Both are bound by memory: Adam moves 28 bytes an
// element (reads p, grad, m, v and writes p, m, v) in one pass.

template <typename T>
double sum_of_squares(const T* x, int64_t count) {
  VecD sum = zero_double();
  for (int64_t k = 0; k < count; k += 16) {
    const VecF v = load_some(x + k, count - k);
    sum = add_product(sum, v, v);
  }
  return reduce_sum(sum);
}

void adam(float* p, const float* grad, float* m, float* v, int64_t count, const AdamStep& step) {
  const VecF beta1 = splat(step.beta1), one_minus_beta1 = splat(step.one_minus_beta1);
  const VecF beta2 = splat(step.beta2), one_minus_beta2 = splat(step.one_minus_beta2);
  for (int64_t k = 0; k < count; k += 16) {
    const int64_t left = count - k;
    VecF weight = load_some(p + k, left);
    VecF g = load_some(grad + k, left) * splat(step.grad_scale);
    if (step.has_l2) g = g + weight * splat(step.l2);
    if (step.has_shrink) weight = weight * splat(step.shrink);
    const VecF mean = load_some(m + k, left) * beta1 + g * one_minus_beta1;
    const VecF square = load_some(v + k, left) * beta2 + (g * g) * one_minus_beta2;
    const VecF denominator = sqrt(square) * splat(step.inv_sqrt_bias) + splat(step.eps);
    store_some(m + k, mean, left);
    store_some(v + k, square, left);
    store_some(p + k, weight - splat(step.step_size) * (mean / denominator), left);
  }
}
