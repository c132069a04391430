// One row to int8, held in registers between the passes: what quantize_act.cu and glu_quantize.cu share.
//
// A Source hands out the row: load(offset) issues the loads of the vector that starts there, pack(raw) turns
// them into the row's values, keep(offset, values) writes these somewhere if kKeeps is set. All loads of a
// row are issued before the first is used, so a row costs one trip to memory.
//
// The passes over a row are a sum of squares (with the norm), a maximum and the rounding; two barriers part
// them. What they cost on a multiprocessor of an H200, where the floor of 16384 x 4096 bf16 (3 bytes a value,
// 4.3 TB/s, 508,000 values a multiprocessor) is 47 us or 82,000 clocks at 1.755 GHz:
//   conversions     1 from fp32 to fp64 a value, 16 a clock: 32,000 clocks
//   fp64            1 multiply-add, 64 a clock: 8,000 clocks
//   fp32            2 products of the norm, 1 product and 1 sum of the rounding, 128 a clock: 16,000 clocks
//   issue           about 16 instructions a value, 128 a clock: 63,000 clocks
// Rounding by adding 1.5 * 2^23 instead of a conversion keeps it out of the first line. What the memory needs
// is loads in flight, about 18 KB: 1,024 threads of 64 registers have up to 64 bytes each under way.
//
// A single row is alone on its multiprocessor, and the conversions of 6,912 values would take 430 clocks in
// which nothing else can happen. Half of them therefore go another way, by 2 integer operations and an fp64
// product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace bitnet_ext::cuda {

// --- shapes ------------------------------------------------------------------------------------------------

// kSlots vectors of kVec values a thread, kThreadsPerRow threads a row, a warp or a whole block.
template <int kVec_, int kThreadsPerRow_, int kSlots_, bool kLoops_ = false>
struct RowShape {
  static constexpr int kVec = kVec_, kThreadsPerRow = kThreadsPerRow_, kSlots = kSlots_;
  static constexpr bool kLoops = kLoops_;                  // rows may be longer than the slots
  static constexpr bool kTwoWays = kThreadsPerRow >= 512;  // to fp64, where few rows share a multiprocessor
  static constexpr int kWarps = kThreadsPerRow / 32;
  static constexpr int kRows = kWarps == 1 ? 4 : 1;  // of a block
  static constexpr int kThreads = kThreadsPerRow * kRows;
  // 1,024 threads of 64 registers on a multiprocessor; three slots do with 56, several rows a block want 72.
  static constexpr int kResident = kRows > 1 ? 896 : kSlots == 3 ? 1152 : 1024;
  static constexpr int kMinBlocks = kVec == 1 || kLoops ? 1 : kResident / kThreads;
};

// Up to here a multiprocessor has one or two rows, and a row is given as many threads as it has vectors: the
// latency is the bound. Beyond, threads have several vectors each and barriers join fewer warps.
constexpr int64_t kFewRows = 256;

// Calls body(RowShape{}). Rows that vectors of 16 bytes cannot take (`wide` unset: a length or an address
// that is no multiple) are read value by value, neighbouring lanes neighbouring values. A row that is longer
// than the last shape's slots is read again for each pass.
template <typename scalar_t, typename Body>
cudaError_t dispatch_row_shape(int64_t M, int64_t K, bool wide, Body&& body) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  constexpr int kValues = 4 * kVec;
  if (!wide) {
    return K <= 32 * kValues ? body(RowShape<1, 32, kValues>{}) : body(RowShape<1, 256, kValues, true>{});
  }
  const int64_t num_vecs = K / kVec;
  if (num_vecs <= 64 && M <= kFewRows) return body(RowShape<kVec, 32, 2>{});
  if (num_vecs <= 128) return body(RowShape<kVec, 32, 4>{});
  if (M <= kFewRows) {
    if (num_vecs <= 512) return body(RowShape<kVec, 512, 1>{});
    if (num_vecs <= 1024) return body(RowShape<kVec, 1024, 1>{});
  } else {
    if (num_vecs <= 384) return body(RowShape<kVec, 128, 3>{});
    if (num_vecs <= 512) return body(RowShape<kVec, 128, 4>{});
    if (num_vecs <= 1024) return body(RowShape<kVec, 256, 4>{});
    if (num_vecs <= 2048) return body(RowShape<kVec, 512, 4>{});
  }
  if (num_vecs <= 4096) return body(RowShape<kVec, 1024, 4>{});
  return body(RowShape<kVec, 512, 4, true>{});
}

// The longest row whose offsets, and those of the step behind its end, are ints.
constexpr int64_t kMaxRowLength = INT32_MAX - 1024 * 8 * 4;

// Of a tensor whose rows start every `stride` elements.
inline bool rows_aligned(const void* base, int64_t stride, int element_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * element_bytes % bytes == 0;
}

// --- memory ------------------------------------------------------------------------------------------------

// kVec neighbours of a row, as the 32-bit words they are loaded in: kept as elements, each would have a
// register of its own.
template <typename scalar_t, int kVec>
struct RowVec {
  uint32_t words[4];

  __device__ __forceinline__ void unpack(float (&out)[kVec]) const {
    static_assert(kVec * sizeof(scalar_t) == 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(scalar_t) == 4) {
        out[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
  // Rounds to nearest even.
  static __device__ __forceinline__ RowVec pack(const float (&v)[kVec]) {
    RowVec out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(scalar_t) == 4) {
        out.words[i] = __float_as_uint(v[i]);
      } else {
        out.words[i] = pack_pair<scalar_t>(v[2 * i], v[2 * i + 1]);
      }
    }
    return out;
  }
  // The row is read once: its loads skip L1, so that the gain stays there. They are not of the read-only path
  // (ld.global.nc), and volatile: a kernel may start before these bytes are written, and a compiler that
  // takes them for constants may move their load in front of wait_for_previous_kernel.
  static __device__ __forceinline__ RowVec load(const scalar_t* p) {
    RowVec out;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.words[0]), "=r"(out.words[1]), "=r"(out.words[2]), "=r"(out.words[3])
                 : "l"(p)
                 : "memory");
    return out;
  }
  __device__ __forceinline__ void store(scalar_t* p) const {
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  // Keeps the compiler from holding the unpacked values of one pass for the next: twice the registers.
  __device__ __forceinline__ void forget_unpacked() {
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
  }
};

template <typename scalar_t>
struct RowVec<scalar_t, 1> {
  float value;

  __device__ __forceinline__ void unpack(float (&out)[1]) const {
    out[0] = value;
  }
  static __device__ __forceinline__ RowVec pack(const float (&v)[1]) {
    return {to_float(from_float<scalar_t>(v[0]))};
  }
  static __device__ __forceinline__ RowVec load(const scalar_t* p) {
    return {to_float(*p)};
  }
  __device__ __forceinline__ void store(scalar_t* p) const {
    *p = from_float<scalar_t>(value);
  }
  __device__ __forceinline__ void forget_unpacked() {}
};

template <int kVec>
__device__ __forceinline__ void load_gains(const float* p, float (&out)[kVec]) {
  if constexpr (kVec == 1) {
    out[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(p + i);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  }
}

// The low bytes of the codes. 8 bytes a lane are 256 in a row of a warp: whole sectors, as 16 would be.
template <int kVec>
__device__ __forceinline__ void store_codes(int8_t* p, const int (&codes)[kVec]) {
  if constexpr (kVec == 1) {
    *p = static_cast<int8_t>(codes[0]);
  } else {
    uint32_t words[kVec / 4];
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      words[i / 4] = __byte_perm(__byte_perm(codes[i], codes[i + 1], 0x0040),
                                 __byte_perm(codes[i + 2], codes[i + 3], 0x0040),
                                 0x5410);
    }
    if constexpr (kVec == 4) {
      *reinterpret_cast<uint32_t*>(p) = words[0];
    } else {
      static_assert(kVec == 8);
      *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    }
  }
}

// --- arithmetic --------------------------------------------------------------------------------------------

// |x| of a finite x, exactly, without the conversion unit: under an fp64 exponent of the same bits the value
// is |x| * 2^-896, subnormal numbers and zero included. NaN and Inf become finite; the maximum sees them.
__device__ __forceinline__ double widened_magnitude(float x) {
  const unsigned bits = __float_as_uint(x) & 0x7fffffffu;
  const double scaled = __hiloint2double(static_cast<int>(bits >> 3), static_cast<int>(bits << 29));
  return scaled * __hiloint2double((1023 + 896) << 20, 0);
}

// Adds the squares, exact in fp64 but for the sum's rounding. Two sums, because each is a chain of dependent
// operations. With kTwoWays half of the values go without the conversion unit.
template <bool kTwoWays, int N>
__device__ __forceinline__ void add_squares(const float (&x)[N], double& even, double& odd) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double v = kTwoWays && i % 2 == 1 ? widened_magnitude(x[i]) : static_cast<double>(x[i]);
    double& sum = i % 2 == 0 ? even : odd;
    sum = fma(v, v, sum);
  }
}

template <int N>
__device__ __forceinline__ void multiply(float (&v)[N], float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], factor);
}
template <int N>
__device__ __forceinline__ void multiply(float (&v)[N], const float (&factors)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], factors[i]);
}

// The largest of `top` and the magnitudes; NaN when one is NaN.
template <int N>
__device__ __forceinline__ float max_magnitude(float top, const float (&x)[N]) {
  float own = fabsf(x[0]);  // a chain apart from the other vectors'
#pragma unroll
  for (int i = 1; i < N; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(own) : "f"(fabsf(x[i])));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(own));
  return top;
}

// Over the kWarps warps of a row, the same bits in every thread. `scratch` is used once a kernel.
template <int kWarps>
__device__ __forceinline__ double row_sum(double v, double* scratch) {
  v = warp_sum(v);
  if constexpr (kWarps > 1) {
    static_assert(kWarps % 4 == 0);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    // Four a thread, the rest by shuffles: fewer operations than either alone.
    const double2* pairs = reinterpret_cast<const double2*>(scratch) + threadIdx.x % (kWarps / 4) * 2;
    const double2 first = pairs[0], second = pairs[1];
    v = (first.x + first.y) + (second.x + second.y);
#pragma unroll
    for (int offset = kWarps / 8; offset > 0; offset >>= 1) v += __shfl_xor_sync(kFullWarp, v, offset);
  }
  return v;
}

template <int kWarps>
__device__ __forceinline__ unsigned row_max(unsigned v, unsigned* scratch) {
  v = __reduce_max_sync(kFullWarp, v);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = __reduce_max_sync(kFullWarp, scratch[threadIdx.x % kWarps]);
  }
  return v;
}

// rint(v) in the low byte, for |v| <= 127.5: the sum's last place is 1, and ties go to the even integer.
__device__ __forceinline__ int code_of(float v) {
  return __float_as_int(__fadd_rn(v, 12582912.0f));
}

// --- a row -------------------------------------------------------------------------------------------------

struct RowNorm {
  bool enabled;
  const float* gain;  // [K] or null
  double eps;
  double inverse_K;  // 1 / K
};

struct RowOutput {
  int8_t* x_i8;      // [M, K]
  float* act_scale;  // [M]
  float* rstd;       // [M] or null
};

// By the Shape::kThreadsPerRow threads of a row, of which this is the one that starts at value k. Its vectors
// are Shape::kThreadsPerRow * Shape::kVec apart; offsets here and in the Source are from k.
//
// Every operation is one correctly rounded fp32 operation (no contraction), as in the reference in PyTorch;
// the mean square is computed in fp64 and rounded once, in rstd.
template <typename Shape, typename Source>
__device__ __forceinline__ void quantize_row(
    const Source& source, const RowNorm& norm, int64_t row, int64_t K, int k, const RowOutput& out) {
  using Vec = typename Source::Vec;
  constexpr int kVec = Shape::kVec, kSlots = Shape::kSlots, kWarps = Shape::kWarps;
  constexpr int kStep = Shape::kThreadsPerRow * kVec, kRest = kSlots * kStep;
  const int left = static_cast<int>(K) - k;  // values from k to the row's end; not positive beyond it
  __shared__ __align__(16) double sum_scratch[kWarps];
  __shared__ unsigned max_scratch[kWarps];

  typename Source::Raw raw[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    raw[slot] = {};
    if (slot * kStep < left) raw[slot] = source.load(slot * kStep);
  }
  float gains[kSlots][kVec];
  const bool has_gain = norm.enabled && norm.gain != nullptr;
  const auto load_all_gains = [&] {
    if (!has_gain) return;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot * kStep < left) load_gains(norm.gain + k + slot * kStep, gains[slot]);
    }
  };
  // One or two slots leave registers for the gain from the start, and its latency then is that of the row.
  if constexpr (kSlots <= 2) load_all_gains();
  Vec packed[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    packed[slot] = source.pack(raw[slot]);
    packed[slot].forget_unpacked();
    if constexpr (Source::kKeeps) {
      if (slot * kStep < left) source.keep(slot * kStep, packed[slot]);
    }
  }
  // What does not fit in registers is read and packed again by every pass.
  if constexpr (Shape::kLoops && Source::kKeeps) {
    for (int offset = kRest; offset < left; offset += kStep) {
      source.keep(offset, source.pack(source.load(offset)));
    }
  }

  // Normalise
  float rstd = 0.0f;
  if (norm.enabled) {
    double even = 0.0, odd = 0.0;
    float v[kVec];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      packed[slot].unpack(v);
      add_squares<Shape::kTwoWays>(v, even, odd);
      packed[slot].forget_unpacked();
    }
    for (int offset = kRest; Shape::kLoops && offset < left; offset += kStep) {
      source.pack(source.load(offset)).unpack(v);
      add_squares<Shape::kTwoWays>(v, even, odd);
    }
    if constexpr (kSlots > 2) load_all_gains();
    const double sum = row_sum<kWarps>(even + odd, sum_scratch);
    rstd = static_cast<float>(rsqrt(fma(sum, norm.inverse_K, norm.eps)));
    // At once: kept for the end it costs a register that some shapes do not have.
    if (k == 0 && out.rstd != nullptr) out.rstd[row] = rstd;
  }
  float values[kSlots][kVec];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    packed[slot].unpack(values[slot]);
    if (norm.enabled) multiply(values[slot], rstd);
    if (has_gain && slot * kStep < left) multiply(values[slot], gains[slot]);
  }
  const auto value_again = [&](int offset, float(&v)[kVec]) {
    source.pack(source.load(offset)).unpack(v);
    if (norm.enabled) multiply(v, rstd);
    if (!has_gain) return;
    float g[kVec];
    load_gains(norm.gain + k + offset, g);
    multiply(v, g);
  };

  // Absolute maximum. As bit patterns NaN and Inf are larger than every number.
  float top = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) top = max_magnitude(top, values[slot]);
  for (int offset = kRest; Shape::kLoops && offset < left; offset += kStep) {
    float v[kVec];
    value_again(offset, v);
    top = max_magnitude(top, v);
  }
  const unsigned max_bits = row_max<kWarps>(__float_as_uint(top), max_scratch);
  const float absmax = __uint_as_float(max(max_bits, __float_as_uint(1e-5f)));
  const float inverse = __fdiv_rn(127.0f, absmax);

  // Quantise. |v * inverse| <= 127 (1 + 2^-22), so there is nothing to clamp.
  int8_t* x_i8 = out.x_i8 + row * K + k;
  const auto quantize = [&](int offset, const float(&v)[kVec]) {
    int codes[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) codes[i] = code_of(__fmul_rn(v[i], inverse));
    store_codes(x_i8 + offset, codes);
  };
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot * kStep < left) quantize(slot * kStep, values[slot]);
  }
  for (int offset = kRest; Shape::kLoops && offset < left; offset += kStep) {
    float v[kVec];
    value_again(offset, v);
    quantize(offset, v);
  }
  if (k == 0) {
    // A row that holds NaN or Inf, or whose normalised values do, says so.
    const bool finite = max_bits < 0x7f800000u;
    const float nan = __uint_as_float(0x7fffffffu);
    out.act_scale[row] = finite ? __fdiv_rn(absmax, 127.0f) : nan;
    if (!finite && norm.enabled && out.rstd != nullptr) out.rstd[row] = nan;
  }
}

}  // namespace bitnet_ext::cuda
