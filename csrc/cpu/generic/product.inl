// Around the integer product: the activations are laid out before it and the result scaled after it.
//
// Byte j of a packed row holds the weights 4j .. 4j + 3, so one shift and mask of 64 packed bytes gives 64
// weights that lie 4 apart in x. Each token is therefore split into 4 planes, plane r holding x[4j + r], in
// blocks that match 64 packed bytes:
//
//     planes [M, ceil(K / 256), 4, 64] int8,   planes[m, b, r, j] = x_i8[m, 256 b + 4 j + r], 0 beyond K
//
// The stored values are code + 1, so sum(x * code) = sum(x * stored) - sum(x); the sums are kept per token.
// Zeros beyond K make the tail of the weights irrelevant.

void make_planes(const int8_t* x_i8, int64_t rows, int64_t K, int8_t* planes, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    int32_t sum = 0;
    for (int64_t start = 0; start < K; start += kDotBlock) {
      int8_t block[kDotBlock] = {};
      __builtin_memcpy(
          block, x_i8 + m * K + start, static_cast<size_t>(K - start < kDotBlock ? K - start : kDotBlock));
      for (int i = 0; i < kDotBlock; ++i) sum += block[i];
      for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < 64; ++j) planes[64 * r + j] = block[4 * j + r];
      }
      planes += kDotBlock;
    }
    sums[m] = sum;
  }
}

// Three roundings in fp32, never fused: act_scale, weight_scale, bias, in this order.
template <typename T>
void scale_row(
    const int32_t* acc, float act_scale, const float* weight_scale, const float* bias, int64_t count, T* y) {
  const VecF token = splat(act_scale);
  for (int64_t n = 0; n < count; n += 16) {
    const int64_t left = count - n;
    VecI sum;
    if (left >= 16) {
      sum = load_i32(acc + n);
    } else {
      int32_t lanes[16] = {};
      for (int64_t i = 0; i < left; ++i) lanes[i] = acc[n + i];
      sum = load_i32(lanes);
    }
    VecF value = (to_float(sum) * token) * load_some(weight_scale + n, left);
    if (bias) value = value + load_some(bias + n, left);
    store_some(y + n, value, left);
  }
}
