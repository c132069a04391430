// Tails, reductions and exp over the 16-lane vectors, in the namespace of the including instruction set.

// --- the last, partial vector of a row: whatever lies beyond is never touched ---

template <typename T>
inline VecF load_tail(const T* p, int64_t count, T fill) {
  T lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < count ? p[i] : fill;
  return load(lanes);
}

// The next 16 elements, or the `left` that remain followed by zeros.
template <typename T>
inline VecF load_some(const T* p, int64_t left) {
  return left >= 16 ? load(p) : load_tail(p, left, T{});
}

template <typename T>
inline void store_some(T* p, VecF x, int64_t left) {
  if (left >= 16) return store(p, x);
  T lanes[16];
  store(lanes, x);
  for (int i = 0; i < left; ++i) p[i] = lanes[i];
}

inline VecI load_i8_some(const int8_t* p, int64_t left) {
  if (left >= 16) return load_i8(p);
  int8_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < left ? p[i] : static_cast<int8_t>(0);
  return load_i8(lanes);
}

inline void store_i8_some(int8_t* p, VecI x, int64_t left) {
  if (left >= 16) return store_i8(p, x);
  int8_t lanes[16];
  store_i8(lanes, x);
  for (int i = 0; i < left; ++i) p[i] = lanes[i];
}

// -inf of every storage type, to fill the tail of a maximum.
inline float minus_infinity(const float*) {
  return -__builtin_inff();
}
inline Bf16 minus_infinity(const Bf16*) {
  return {0xff80};
}
inline Half minus_infinity(const Half*) {
  return {0xfc00};
}

// --- across lanes, by halving: 16 -> 8 -> 4 -> 2 -> 1 ---

inline double reduce_sum(VecD x) {
  double lane[16];
  store(lane, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

inline int32_t reduce_max(VecI x) {
  int32_t lane[16];
  store_i32(lane, x);
  int32_t top = lane[0];
  for (int i = 1; i < 16; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
}

inline VecI magnitude_bits(VecF x) {
  return bits(x) & splat_int(0x7fffffff);
}
inline VecF absolute(VecF x) {
  return from_bits(magnitude_bits(x));
}

inline float float_of_bits(int32_t raw) {
  float x;
  __builtin_memcpy(&x, &raw, sizeof x);
  return x;
}

// As magnitudes, bit patterns order like the values, with Inf and NaN above every finite number.
constexpr int32_t kInfinityBits = 0x7f800000;

// exp(x) for x <= 88.3, larger x clamped to that. Below -87 the result, under 1.7e-38, is 0; NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2 and exp(x) = 2^n (1 + r + r^2 q(r)), q of degree 5 fitted for the least
// largest error of the whole (5.2e-11 before rounding). Measured over 26 million arguments: at most 0.97 ulp.
inline VecF exponential(VecF x) {
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const VecF top = min(splat(88.3f), x);
  const VecF shifted = top * splat(1.4426950408889634f) + magic;
  const VecF n = shifted - magic;
  // ln2 in two parts: n * 0.693359375 is exact, its 10 bits and the 8 of n fit in 24.
  const VecF r = (top - n * splat(0.693359375f)) - n * splat(-2.12194440055e-4f);
  VecF q = splat(1.97902977e-4f);
  q = q * r + splat(1.39447034e-3f);
  q = q * r + splat(8.33349768e-3f);
  q = q * r + splat(4.16662954e-2f);
  q = q * r + splat(1.66666657e-1f);
  q = q * r + splat(0.5f);
  const VecF power = (q * (r * r) + r) + splat(1.0f);
  const VecF scale = from_bits(shift_left_23(bits(shifted) - splat_int(0x4b400000 - 127)));
  return select(greater(splat(-87.0f), x), splat(0.0f), power * scale);
}
