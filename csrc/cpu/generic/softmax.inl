// Row statistics of the logits and the gradient of the loss, both over [T, V]. The statistics take two passes
// over a row (V = 50257: 200 kB of fp32, which stays in L2), the gradient one. About half of the time is exp.

// Partial sums of this many elements are kept in fp32 (32 additions a lane), then added in fp64.
constexpr int64_t kSoftmaxBlock = 512;

template <typename T>
void softmax_stats(const T* logits, const int64_t* target, int64_t rows, int64_t V, const SoftmaxStats& out) {
  for (int64_t t = 0; t < rows; ++t) {
    const T* row = logits + t * V;

    // Pass 1: the largest logit, the first place where it stands, and the sum of all.
    VecF best = splat(-__builtin_inff());
    VecI best_at = splat_int(0), at = lane_index();
    VecD total = zero_double();
    for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
      const int64_t end = start + kSoftmaxBlock < V ? start + kSoftmaxBlock : V;
      VecF sum = splat(0.0f);
      for (int64_t j = start; j < end; j += 16) {
        const int64_t left = end - j;
        sum = sum + load_some(row + j, left);
        const VecF z = left >= 16 ? load(row + j) : load_tail(row + j, left, minus_infinity(row));
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
    out.mean_logit[t] = static_cast<float>(reduce_sum(total) / static_cast<double>(V));
    out.argmax[t] = top_at;
    float target_lane[16];
    store(target_lane, load_tail(row + (target[t] < 0 ? 0 : target[t]), 1, T{}));
    out.target_logit[t] = target[t] < 0 ? 0.0f : target_lane[0];
  }
}

// z <- row_scale * (p * (row_coef + entropy_weight * (z - lse) + diversity_weight * log_marginal)
//                   - target_weight * [j == target] - uniform_weight),   p = exp(z - lse)
template <typename T, bool kHasMarginal>
struct GradRow {
  const SoftmaxGrad& in;
  int64_t t;

  // Everything between row_scale and the last two terms.
  VecF product(VecF z, VecF log_marginal) const {
    // Clamped so that p = 0 is never multiplied by an infinity; exp is 0 long before.
    const VecF log_p = max(splat(-200.0f), z - splat(in.lse[t]));
    VecF factor = splat(in.row_coef[t]) + splat(in.entropy_weight) * log_p;
    if (kHasMarginal) factor = factor + splat(in.diversity_weight) * max(splat(-1e30f), log_marginal);
    return exponential(log_p) * factor;
  }

  void run(T* row, int64_t V) const {
    const int64_t target = in.target[t];
    const VecF scale = splat(in.row_scale[t]), uniform = splat(in.uniform_weight);
    const VecF none = splat(0.0f);
    T target_value[1] = {};
    if (target >= 0) {
      // The one place with another term, computed before the row is overwritten.
      const VecF z = load_tail(row + target, 1, T{});
      const VecF marginal = kHasMarginal ? load_tail(in.log_marginal + target, 1, 0.0f) : none;
      const VecF grad = scale * ((product(z, marginal) - splat(in.target_weight)) - uniform);
      store_some(target_value, grad, 1);
    }
    for (int64_t j = 0; j < V; j += 16) {
      const VecF marginal = kHasMarginal ? load_some(in.log_marginal + j, V - j) : none;
      store_some(row + j, scale * (product(load_some(row + j, V - j), marginal) - uniform), V - j);
    }
    if (target >= 0) row[target] = target_value[0];
  }
};

template <typename T>
void softmax_grad(T* logits, int64_t rows, int64_t V, const SoftmaxGrad& in) {
  for (int64_t t = 0; t < rows; ++t) {
    if (in.log_marginal) {
      GradRow<T, true>{in, t}.run(logits + t * V, V);
    } else {
      GradRow<T, false>{in, t}.run(logits + t * V, V);
    }
  }
}
