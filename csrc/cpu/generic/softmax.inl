// Row statistics of the logits, and the loss with its gradient, both over [T, V]. The statistics take two
// passes over a row (V = 50257: 200 kB of fp32, which stays in L2), the gradient one. About half of the time
// is exp.

// Partial sums of this many elements are kept in fp32 (32 additions a lane), then added in fp64.
constexpr int64_t kSoftmaxBlock = 512;

// c tanh(raw / c), or raw when cap is 0; -inf, which marks what lies behind a row, stays. tanh is x + x^3
// q(x^2) below 0.625, q of degree 4, 1 - 2 / (exp(2 |x|) + 1) above.
inline VecF cap_logit(VecF raw, float cap) {
  if (cap == 0.0f) return raw;
  const VecF x = raw / splat(cap);
  const VecF square = x * x;
  VecF q = splat(-5.70498872745e-3f);
  q = q * square + splat(2.06390887954e-2f);
  q = q * square + splat(-5.37397155531e-2f);
  q = q * square + splat(1.33314422036e-1f);
  q = q * square + splat(-3.33332819422e-1f);
  const VecF near = (q * square) * x + x;
  const VecF size = absolute(x);
  const VecF power = exponential(size + size);
  const VecF far = splat(1.0f) - splat(2.0f) / (power + splat(1.0f));
  const VecF tanh =
      select(greater(splat(0.625f), size), near, select(greater(x, splat(0.0f)), far, splat(0.0f) - far));
  return select(greater(raw, splat(-__builtin_inff())), splat(cap) * tanh, raw);
}

// The largest logit of a row, the first place where it stands, and the sum of all; capped first unless cap is
// 0.
struct RowTop {
  float value;
  int32_t index;
  double total;
};

template <typename T>
RowTop row_top(const T* row, int64_t V, float cap) {
  VecF best = splat(-__builtin_inff());
  VecI best_at = splat_int(0), at = lane_index();
  VecD total = zero_double();
  for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
    const int64_t end = start + kSoftmaxBlock < V ? start + kSoftmaxBlock : V;
    VecF sum = splat(0.0f);
    for (int64_t j = start; j < end; j += 16) {
      const int64_t left = end - j;
      sum = sum + cap_logit(load_some(row + j, left), cap);
      const VecF raw = left >= 16 ? load(row + j) : load_tail(row + j, left, minus_infinity(row));
      const VecF z = cap_logit(raw, cap);
      const Mask better = greater(z, best);
      best = select(better, z, best);
      best_at = select(better, at, best_at);
      at = at + splat_int(16);
    }
    total = add(total, sum);
  }
  float best_lane[16];
  int32_t at_lane[16];
  store(best_lane, best);
  store_i32(at_lane, best_at);
  float top = best_lane[0];
  int32_t top_at = at_lane[0];
  for (int i = 1; i < 16; ++i) {
    if (best_lane[i] > top || (best_lane[i] == top && at_lane[i] < top_at)) {
      top = best_lane[i];
      top_at = at_lane[i];
    }
  }
  return {top, top_at, reduce_sum(total)};
}

template <typename T>
void softmax_stats(const T* logits, const int64_t* target, int64_t rows, int64_t V, const SoftmaxStats& out) {
  for (int64_t t = 0; t < rows; ++t) {
    const T* row = logits + t * V;
    const RowTop row_max = row_top(row, V, 0.0f);
    const float top = row_max.value;

    // Pass 2: sum of exp(z - top) and of exp(z - top) * z. Where exp is 0 its product with z = -inf is left
    // out.
    VecD exps = zero_double(), weighted = zero_double();
    for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
      const int64_t end = start + kSoftmaxBlock < V ? start + kSoftmaxBlock : V;
      VecF sum = splat(0.0f), sum_z = splat(0.0f);
      for (int64_t j = start; j < end; j += 16) {
        const int64_t left = end - j;
        const VecF z = left >= 16 ? load(row + j) : load_tail(row + j, left, minus_infinity(row));
        const VecF e = exponential(z - splat(top));
        sum = sum + e;
        sum_z = sum_z + e * select(greater(e, splat(0.0f)), z, splat(0.0f));
      }
      exps = add(exps, sum);
      weighted = add(weighted, sum_z);
    }
    const double exp_sum = reduce_sum(exps);
    out.lse[t] = static_cast<double>(top) + __builtin_log(exp_sum);
    out.expected_logit[t] = static_cast<float>(reduce_sum(weighted) / exp_sum);
    out.mean_logit[t] = static_cast<float>(row_max.total / static_cast<double>(V));
    out.argmax[t] = row_max.index;
    float target_lane[16];
    store(target_lane, load_tail(row + (target[t] < 0 ? 0 : target[t]), 1, T{}));
    out.target_logit[t] = target[t] < 0 ? 0.0f : target_lane[0];
  }
}

// Statistics of each row in two passes, then the gradient of the loss in its place (the formula is at the top
// of csrc/cuda/cross_entropy.cu). Where a gradient follows, the second pass leaves exp(z_j - max) in place of
// the logits when no term needs log p_j again, so the third has no exp to compute, and capped logits if there
// is a cap.
void cross_entropy_rows(float* logits, int64_t rows, int64_t V, int64_t stride, const CrossEntropyRows& in) {
  const VecF none = splat(0.0f);
  const bool keeps_capped = in.write_gradient && in.softcap != 0.0f;
  const bool keeps_exp =
      in.write_gradient && in.entropy_weight == 0.0f && in.softcap == 0.0f && !in.log_marginal;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = logits + t * stride;
    const RowTop top = row_top(row, V, in.softcap);
    const VecF base = splat(top.value);
    const int64_t target = in.target[t];
    float target_lane[16];
    store(target_lane, cap_logit(load_tail(row + (target < 0 ? 0 : target), 1, 0.0f), in.softcap));
    const float target_logit = target_lane[0];

    VecD exps = zero_double(), shifted = zero_double(), marginal = zero_double();
    for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
      const int64_t end = start + kSoftmaxBlock < V ? start + kSoftmaxBlock : V;
      VecF sum = none, sum_shifted = none, sum_marginal = none;
      for (int64_t j = start; j < end; j += 16) {
        const int64_t left = end - j;
        const VecF raw = left >= 16 ? load(row + j) : load_tail(row + j, left, minus_infinity(row));
        const VecF z = cap_logit(raw, in.softcap);
        const VecF shift = z - base;
        const VecF e = exponential(shift);
        sum = sum + e;
        // Where exp is 0 its product with a shift of -inf is left out.
        sum_shifted = sum_shifted + e * select(greater(e, none), shift, none);
        if (in.log_marginal) {
          const VecF l = load_some(in.log_marginal + j, left);
          sum_marginal = sum_marginal + e * max(splat(-1e30f), l);
        }
        if (keeps_exp) store_some(row + j, e, left);
        if (keeps_capped) store_some(row + j, z, left);
      }
      exps = add(exps, sum);
      shifted = add(shifted, sum_shifted);
      marginal = add(marginal, sum_marginal);
    }
    const double exp_sum = reduce_sum(exps);
    const double log_sum = __builtin_log(exp_sum);
    const double lse = static_cast<double>(top.value) + log_sum;
    const double entropy = log_sum - reduce_sum(shifted) / exp_sum;
    in.lse[t] = static_cast<float>(lse);
    in.cross_entropy[t] = target < 0 ? 0.0f : static_cast<float>(lse - static_cast<double>(target_logit));
    in.entropy[t] = static_cast<float>(entropy);
    in.smoothing[t] = static_cast<float>(lse - top.total / static_cast<double>(V));
    in.argmax[t] = top.index;
    if (!in.write_gradient) continue;

    // The gradient; an ignored row gets zeros whatever it holds.
    for (int64_t j = target < 0 ? 0 : V; j < stride; ++j) row[j] = 0.0f;
    if (target < 0) continue;
    double coef =
        1.0 + 2.0 * static_cast<double>(in.z_loss) * lse + static_cast<double>(in.entropy_weight) * entropy;
    if (in.log_marginal) coef -= static_cast<double>(in.diversity_weight) * reduce_sum(marginal) / exp_sum;
    const float scale = in.scale;
    const VecF uniform = splat(scale * (in.label_smoothing / static_cast<float>(V)));
    const float on_target = scale * (1.0f - in.label_smoothing);
    if (keeps_exp) {
      const VecF e_scale = splat(static_cast<float>(coef / exp_sum * static_cast<double>(scale)));
      for (int64_t j = 0; j < V; j += 16) {
        store_some(row + j, load_some(row + j, V - j) * e_scale - uniform, V - j);
      }
      row[target] = row[target] - on_target;
      continue;
    }
    const VecF p_scale = splat(static_cast<float>(static_cast<double>(scale) / exp_sum));
    const VecF log_p_base = splat(static_cast<float>(log_sum)), row_coef = splat(static_cast<float>(coef));
    const float capped_target = target_logit / (in.softcap == 0.0f ? 1.0f : in.softcap);
    for (int64_t j = 0; j < V; j += 16) {
      const int64_t left = V - j;
      const VecF z = load_some(row + j, left);
      // Not below -200, where exp is 0, so that p = 0 is never multiplied by an infinity.
      const VecF shift = max(splat(-200.0f), z - base);
      VecF factor = row_coef + splat(in.entropy_weight) * (shift - log_p_base);
      if (in.log_marginal) {
        const VecF l = load_some(in.log_marginal + j, left);
        factor = factor + splat(in.diversity_weight) * max(splat(-1e30f), l);
      }
      VecF grad = (exponential(z - base) * p_scale) * factor - uniform;
      if (in.softcap != 0.0f) {
        const VecF share = z / splat(in.softcap);
        grad = grad * (splat(1.0f) - share * share);
      }
      store_some(row + j, grad, left);
    }
    row[target] =
        row[target] - (in.softcap == 0.0f ? on_target : on_target * (1.0f - capped_target * capped_target));
  }
}

void probability_sums(const float* logits,
                      const int64_t* target,
                      const float* lse,
                      float softcap,
                      int64_t rows,
                      int64_t V,
                      int64_t stride,
                      float* sums) {
  for (int64_t j = 0; j < V; ++j) sums[j] = 0.0f;
  for (int64_t t = 0; t < rows; ++t) {
    if (target[t] < 0) continue;
    const float* row = logits + t * stride;
    for (int64_t j = 0; j < V; j += 16) {
      const int64_t left = V - j;
      const VecF z = cap_logit(load_some(row + j, left), softcap);
      store_some(sums + j, load_some(sums + j, left) + exponential(z - splat(lse[t])), left);
    }
  }
}

// Three passes over a row while it is in the cache: its largest logit and mean; the sums of exp, of exp times
// the shifted logit and of the squared distances from the mean, with exp left in the row; its share of the
// mass.
void predicted_rows(
    float* logits, const int64_t* target, int64_t rows, int64_t V, int64_t stride, const PredictedRows& out) {
  const VecF none = splat(0.0f);
  for (int64_t j = 0; j < V; ++j) out.mass[j] = 0.0f;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = logits + t * stride;
    const RowTop top = row_top(row, V, 0.0f);
    const float mean_logit = static_cast<float>(top.total / static_cast<double>(V));
    const VecF base = splat(top.value), mean = splat(mean_logit);
    const float target_logit = target[t] < 0 ? 0.0f : row[target[t]];
    VecD exps = zero_double(), shifted = zero_double(), squares = zero_double();
    for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
      const int64_t end = start + kSoftmaxBlock < V ? start + kSoftmaxBlock : V;
      VecF sum = none, sum_shifted = none, sum_squares = none;
      for (int64_t j = start; j < end; j += 16) {
        const int64_t left = end - j;
        // Behind the row -inf adds nothing to the sums of exp, and the mean nothing to that of the squares.
        const VecF z = left >= 16 ? load(row + j) : load_tail(row + j, left, minus_infinity(row));
        const VecF shift = z - base;
        const VecF e = exponential(shift);
        const VecF centred = (left >= 16 ? z : load_tail(row + j, left, mean_logit)) - mean;
        sum = sum + e;
        sum_shifted = sum_shifted + e * select(greater(e, none), shift, none);
        sum_squares = sum_squares + centred * centred;
        store_some(row + j, e, left);
      }
      exps = add(exps, sum);
      shifted = add(shifted, sum_shifted);
      squares = add(squares, sum_squares);
    }
    const double exp_sum = reduce_sum(exps);
    const double log_sum = __builtin_log(exp_sum);
    const double lse = static_cast<double>(top.value) + log_sum;
    out.cross_entropy[t] = target[t] < 0 ? 0.0 : lse - static_cast<double>(target_logit);
    out.entropy[t] = log_sum - reduce_sum(shifted) / exp_sum;
    out.top_log_probability[t] = -log_sum;
    out.logit_std[t] = static_cast<float>(__builtin_sqrt(reduce_sum(squares) / static_cast<double>(V)));
    out.argmax[t] = top.index;
    if (target[t] < 0) continue;
    const VecF share = splat(static_cast<float>(1.0 / exp_sum));
    for (int64_t j = 0; j < V; j += 16) {
      const int64_t left = V - j;
      store_some(out.mass + j, load_some(out.mass + j, left) + load_some(row + j, left) * share, left);
    }
  }
}
