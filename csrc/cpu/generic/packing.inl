// Packing and unpacking of the 2-bit layout, four codes at a time in a 32-bit word. The loops have no
// intrinsics: the compiler widens them to the instruction set of the file that includes this one.

inline uint32_t load_word(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// out[j] = the stored values 4j .. 4j + 3, each in 0..3.
inline void gather_bytes(const int8_t* stored, int64_t count, uint8_t* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = gather_byte(load_word(stored + kCodesPerByte * j));
}

bool pack(const int8_t* codes, int64_t rows, int64_t K, uint8_t* packed) {
  if (K % kCodesPerByte == 0) {  // one long row: no tails
    K *= rows;
    rows = 1;
  }
  const int64_t whole = K / kCodesPerByte;
  const int64_t tail = K % kCodesPerByte;
  uint32_t invalid = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const int8_t* row = codes + n * K;
    uint8_t* out = packed + n * packed_bytes(K);
    for (int64_t j = 0; j < whole; ++j) {
      const uint32_t stored = stored_from_codes(load_word(row + kCodesPerByte * j));
      invalid |= invalid_stored(stored);
      out[j] = gather_byte(stored);
    }
    if (tail > 0) {
      int8_t last[kCodesPerByte] = {0, 0, 0, 0};
      for (int64_t i = 0; i < tail; ++i) last[i] = row[kCodesPerByte * whole + i];
      const uint32_t stored = stored_from_codes(load_word(last));
      invalid |= invalid_stored(stored);
      out[whole] = gather_byte(stored);
    }
  }
  return invalid == 0;
}

bool unpack(const uint8_t* packed, int64_t rows, int64_t K, int8_t* codes) {
  if (K % kCodesPerByte == 0) {
    K *= rows;
    rows = 1;
  }
  const int64_t whole = K / kCodesPerByte;
  const int64_t tail = K % kCodesPerByte;
  uint32_t invalid = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* row = packed + n * packed_bytes(K);
    int8_t* out = codes + n * K;
    for (int64_t j = 0; j < whole; ++j) {
      const uint32_t stored = spread_byte(row[j]);
      invalid |= invalid_stored(stored);
      const uint32_t word = codes_from_stored(stored);
      __builtin_memcpy(out + kCodesPerByte * j, &word, sizeof word);
    }
    if (tail > 0) {
      const uint32_t stored = spread_byte(row[whole]);
      invalid |= invalid_stored(stored);
      for (int64_t i = 0; i < tail; ++i) {
        out[kCodesPerByte * whole + i] = static_cast<int8_t>(code_at(row, kCodesPerByte * whole + i));
      }
    }
  }
  return invalid == 0;
}

// w = code * scale, scale of row n at scale[n * scale_stride].
template <typename T>
bool dequantize_ternary(
    const uint8_t* packed, const float* scale, int64_t scale_stride, int64_t rows, int64_t K, T* w) {
  constexpr int kChunk = 256;
  bool valid = true;
  const int64_t row_bytes = packed_bytes(K);
  for (int64_t n = 0; n < rows; ++n) {
    const VecF row_scale = splat(scale[n * scale_stride]);
    for (int64_t start = 0; start < K; start += kChunk) {
      int8_t codes[kChunk];
      const int64_t left = K - start < kChunk ? K - start : kChunk;
      // Whole bytes, so that the last vector of the row reads initialised memory.
      valid &= unpack(
          packed + n * row_bytes + start / kCodesPerByte, 1, packed_bytes(left) * kCodesPerByte, codes);
      for (int64_t k = 0; k < left; k += 16) {
        const VecF value = to_float(load_i8_some(codes + k, left - k)) * row_scale;
        store_some(w + n * K + start + k, value, left - k);
      }
    }
  }
  return valid;
}
