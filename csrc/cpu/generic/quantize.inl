// Quantisation of activations and weights. All of it is bound by memory: a row is read from DRAM once and
// from L1 or L2 in the later passes over it.

// --- activations: int8, one scale a row ---

// Where a vector of 16 to quantise comes from: x itself, or x normalised by RMSNorm.
template <typename T>
struct PlainRow {
  const T* x;
  int64_t K;
  VecF at(int64_t k) const {
    return load_some(x + k, K - k);
  }
};

template <typename T, bool kHasGain>
struct NormalizedRow {
  const T* x;
  int64_t K;
  const float* gain;
  VecF rstd;
  VecF at(int64_t k) const {
    const VecF y = load_some(x + k, K - k) * rstd;
    return kHasGain ? y * load_some(gain + k, K - k) : y;
  }
};

// a = max(absmax, 1e-5), x_i8 = clamp(rint(y * (127 / a)), -128, 127), act_scale = a / 127.
template <typename Row>
inline bool quantize_row(const Row& row, int8_t* x_i8, float* act_scale) {
  VecI top = splat_int(0);
  for (int64_t k = 0; k < row.K; k += 16) top = max(top, magnitude_bits(row.at(k)));
  const int32_t top_bits = reduce_max(top);
  if (top_bits >= kInfinityBits) return false;
  const float absmax = float_of_bits(top_bits);
  const float a = absmax > 1e-5f ? absmax : 1e-5f;
  *act_scale = a / 127.0f;
  const VecF inverse = splat(127.0f / a);
  for (int64_t k = 0; k < row.K; k += 16) {
    const VecI rounded = to_int(row.at(k) * inverse);
    store_i8_some(x_i8 + k, min(max(rounded, splat_int(-128)), splat_int(127)), row.K - k);
  }
  return true;
}

template <typename T>
bool quantize_act(const T* x, int64_t rows, int64_t K, int8_t* x_i8, float* act_scale) {
  bool finite = true;
  for (int64_t m = 0; m < rows; ++m) {
    finite &= quantize_row(PlainRow<T>{x + m * K, K}, x_i8 + m * K, act_scale + m);
  }
  return finite;
}

// 1 / sqrt(mean(x^2) + eps) of a row
template <typename T>
inline float rstd_of(const T* row, double eps, int64_t K) {
  VecD squares = zero_double();
  for (int64_t k = 0; k < K; k += 16) {
    const VecF v = load_some(row + k, K - k);
    squares = add_product(squares, v, v);
  }
  return static_cast<float>(1.0 / __builtin_sqrt(reduce_sum(squares) / static_cast<double>(K) + eps));
}

// rstd_of, then quantize_act of x * rstd * gain.
template <bool kHasGain, typename T>
bool rms_norm_quantize_rows(const T* x,
                            const float* gain,
                            double eps,
                            int64_t rows,
                            int64_t K,
                            int8_t* x_i8,
                            float* act_scale,
                            float* rstd) {
  bool finite = true;
  for (int64_t m = 0; m < rows; ++m) {
    const T* row = x + m * K;
    rstd[m] = rstd_of(row, eps, K);
    const NormalizedRow<T, kHasGain> normalized{row, K, gain, splat(rstd[m])};
    finite &= quantize_row(normalized, x_i8 + m * K, act_scale + m);
  }
  return finite;
}

template <typename T>
bool rms_norm_quantize(const T* x,
                       const float* gain,
                       double eps,
                       int64_t rows,
                       int64_t K,
                       int8_t* x_i8,
                       float* act_scale,
                       float* rstd) {
  return gain ? rms_norm_quantize_rows<true>(x, gain, eps, rows, K, x_i8, act_scale, rstd)
              : rms_norm_quantize_rows<false>(x, gain, eps, rows, K, x_i8, act_scale, rstd);
}

template <typename T>
void dequantize_act(const int8_t* x_i8, const float* act_scale, int64_t rows, int64_t K, T* y) {
  for (int64_t m = 0; m < rows; ++m) {
    const VecF scale = splat(act_scale[m]);
    for (int64_t k = 0; k < K; k += 16) {
      const VecF value = to_float(load_i8_some(x_i8 + m * K + k, K - k)) * scale;
      store_some(y + m * K + k, value, K - k);
    }
  }
}

// --- weights: ternary, one scale ---

// sum |w| of every kSumBlock consecutive elements.
template <typename T>
void abs_sums(const T* w, int64_t count, double* block_sums) {
  for (int64_t start = 0; start < count; start += kSumBlock) {
    const int64_t end = start + kSumBlock < count ? start + kSumBlock : count;
    VecD sum = zero_double();
    for (int64_t k = start; k < end; k += 16) sum = add(sum, absolute(load_some(w + k, end - k)));
    *block_sums++ = reduce_sum(sum);
  }
}

// clamp(rint(w / s), -1, 1) is 1 above s / 2, -1 below -s / 2 and 0 between; at exactly half, rint gives 0.
inline VecI ternary_code(VecF w, VecF half_scale) {
  const VecI negative = select(greater(splat(0.0f) - half_scale, w), splat_int(-1), splat_int(0));
  return select(greater(w, half_scale), splat_int(1), negative);
}

template <typename T>
void ternary_codes(const T* w, int64_t count, float half_scale, int8_t* codes) {
  const VecF half = splat(half_scale);
  for (int64_t k = 0; k < count; k += 16) {
    store_i8_some(codes + k, ternary_code(load_some(w + k, count - k), half), count - k);
  }
}

template <typename T>
void ternary_pack(const T* w, int64_t rows, int64_t K, float half_scale, uint8_t* packed) {
  constexpr int kChunk = 256;  // codes that wait in L1 to be packed
  const VecF half = splat(half_scale);
  const int64_t row_bytes = packed_bytes(K);
  for (int64_t n = 0; n < rows; ++n) {
    const T* row = w + n * K;
    uint8_t* out = packed + n * row_bytes;
    for (int64_t start = 0; start < K; start += kChunk) {
      int8_t stored[kChunk];
      const int64_t left = K - start < kChunk ? K - start : kChunk;
      // Zeros beyond the row become code 0, the canonical filling.
      for (int64_t k = 0; k < left; k += 16) {
        const VecI code = ternary_code(load_some(row + start + k, left - k), half);
        store_i8(stored + k, code + splat_int(1));
      }
      gather_bytes(stored, packed_bytes(left), out + start / kCodesPerByte);
    }
  }
}
