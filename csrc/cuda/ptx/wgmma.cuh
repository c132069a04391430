// Warpgroup matrix multiply-accumulate of 8-bit integers, weights from registers (sm_90a).
//
//   d[64 x N] (+)= a[64 x 32] * b[32 x N]      int8 operands, int32 sums
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of a and d, in the fragments of mma.sync m16n8k32:
// with g = lane / 4, t = lane % 4, d[4 j + i] is row g + 8 (i / 2), column 8 j + 2 t + i % 2. b comes from
// shared memory, [N][128 bytes] of K in the 128-byte swizzle that the copy engine writes.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace bitnet_ext::cuda {

// Orders register accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the computation of an operand's registers in front of the fence that precedes their use: the
// compiler, which may move arithmetic past a fence, would otherwise have to serialise the products.
__device__ __forceinline__ void wgmma_operand(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// Keeps what is computed from `v` behind the wait that precedes this: registers that products still read or
// write must not be touched, and neither nvcc nor ptxas sees to that.
__device__ __forceinline__ void wgmma_not_before(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)::"memory");
}

template <int kCount>
__device__ __forceinline__ void wgmma_not_before(int (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// 16 bytes of shared memory, loaded where this stands with respect to the waits.
__device__ __forceinline__ void load_shared_16(const void* address, uint4& v) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(address))
               : "memory");
}

// Descriptor of b at `tile`, which is a multiple of 1,024 bytes: groups of 8 rows of 128 bytes follow each
// other, and the 16-byte pieces of a row are swizzled over 128 bytes. Adding 2 moves on by 32 bytes of K.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  constexpr uint64_t kGroupStride = 1024 / 16, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3FFFFu) >> 4 | uint64_t{1} << 16 | kGroupStride << 32 | kSwizzle128 << 62;
}

// d = a * b when `accumulate` is 0, else d += a * b.
template <int kN>
struct Wgmma;

template <>
struct Wgmma<16> {
  static __device__ __forceinline__ void multiply(int (&d)[8],
                                                  const uint32_t (&a)[4],
                                                  uint64_t b,
                                                  int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, p;\n"
        "}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<32> {
  static __device__ __forceinline__ void multiply(int (&d)[16],
                                                  const uint32_t (&a)[4],
                                                  uint64_t b,
                                                  int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        " %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, p;\n"
        "}\n"
        : "+r"(d[0]),
          "+r"(d[1]),
          "+r"(d[2]),
          "+r"(d[3]),
          "+r"(d[4]),
          "+r"(d[5]),
          "+r"(d[6]),
          "+r"(d[7]),
          "+r"(d[8]),
          "+r"(d[9]),
          "+r"(d[10]),
          "+r"(d[11]),
          "+r"(d[12]),
          "+r"(d[13]),
          "+r"(d[14]),
          "+r"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<64> {
  static __device__ __forceinline__ void multiply(int (&d)[32],
                                                  const uint32_t (&a)[4],
                                                  uint64_t b,
                                                  int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        " %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, "
        " %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p;\n"
        "}\n"
        : "+r"(d[0]),
          "+r"(d[1]),
          "+r"(d[2]),
          "+r"(d[3]),
          "+r"(d[4]),
          "+r"(d[5]),
          "+r"(d[6]),
          "+r"(d[7]),
          "+r"(d[8]),
          "+r"(d[9]),
          "+r"(d[10]),
          "+r"(d[11]),
          "+r"(d[12]),
          "+r"(d[13]),
          "+r"(d[14]),
          "+r"(d[15]),
          "+r"(d[16]),
          "+r"(d[17]),
          "+r"(d[18]),
          "+r"(d[19]),
          "+r"(d[20]),
          "+r"(d[21]),
          "+r"(d[22]),
          "+r"(d[23]),
          "+r"(d[24]),
          "+r"(d[25]),
          "+r"(d[26]),
          "+r"(d[27]),
          "+r"(d[28]),
          "+r"(d[29]),
          "+r"(d[30]),
          "+r"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<128> {
  static __device__ __forceinline__ void multiply(int (&d)[64],
                                                  const uint32_t (&a)[4],
                                                  uint64_t b,
                                                  int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        " %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, "
        " %24, %25, %26, %27, %28, %29, %30, %31, "
        " %32, %33, %34, %35, %36, %37, %38, %39, "
        " %40, %41, %42, %43, %44, %45, %46, %47, "
        " %48, %49, %50, %51, %52, %53, %54, %55, "
        " %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p;\n"
        "}\n"
        : "+r"(d[0]),
          "+r"(d[1]),
          "+r"(d[2]),
          "+r"(d[3]),
          "+r"(d[4]),
          "+r"(d[5]),
          "+r"(d[6]),
          "+r"(d[7]),
          "+r"(d[8]),
          "+r"(d[9]),
          "+r"(d[10]),
          "+r"(d[11]),
          "+r"(d[12]),
          "+r"(d[13]),
          "+r"(d[14]),
          "+r"(d[15]),
          "+r"(d[16]),
          "+r"(d[17]),
          "+r"(d[18]),
          "+r"(d[19]),
          "+r"(d[20]),
          "+r"(d[21]),
          "+r"(d[22]),
          "+r"(d[23]),
          "+r"(d[24]),
          "+r"(d[25]),
          "+r"(d[26]),
          "+r"(d[27]),
          "+r"(d[28]),
          "+r"(d[29]),
          "+r"(d[30]),
          "+r"(d[31]),
          "+r"(d[32]),
          "+r"(d[33]),
          "+r"(d[34]),
          "+r"(d[35]),
          "+r"(d[36]),
          "+r"(d[37]),
          "+r"(d[38]),
          "+r"(d[39]),
          "+r"(d[40]),
          "+r"(d[41]),
          "+r"(d[42]),
          "+r"(d[43]),
          "+r"(d[44]),
          "+r"(d[45]),
          "+r"(d[46]),
          "+r"(d[47]),
          "+r"(d[48]),
          "+r"(d[49]),
          "+r"(d[50]),
          "+r"(d[51]),
          "+r"(d[52]),
          "+r"(d[53]),
          "+r"(d[54]),
          "+r"(d[55]),
          "+r"(d[56]),
          "+r"(d[57]),
          "+r"(d[58]),
          "+r"(d[59]),
          "+r"(d[60]),
          "+r"(d[61]),
          "+r"(d[62]),
          "+r"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<192> {
  static __device__ __forceinline__ void multiply(int (&d)[96],
                                                  const uint32_t (&a)[4],
                                                  uint64_t b,
                                                  int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        " %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, "
        " %24, %25, %26, %27, %28, %29, %30, %31, "
        " %32, %33, %34, %35, %36, %37, %38, %39, "
        " %40, %41, %42, %43, %44, %45, %46, %47, "
        " %48, %49, %50, %51, %52, %53, %54, %55, "
        " %56, %57, %58, %59, %60, %61, %62, %63, "
        " %64, %65, %66, %67, %68, %69, %70, %71, "
        " %72, %73, %74, %75, %76, %77, %78, %79, "
        " %80, %81, %82, %83, %84, %85, %86, %87, "
        " %88, %89, %90, %91, %92, %93, %94, %95}, "
        "{%96, %97, %98, %99}, %100, p;\n"
        "}\n"
        : "+r"(d[0]),
          "+r"(d[1]),
          "+r"(d[2]),
          "+r"(d[3]),
          "+r"(d[4]),
          "+r"(d[5]),
          "+r"(d[6]),
          "+r"(d[7]),
          "+r"(d[8]),
          "+r"(d[9]),
          "+r"(d[10]),
          "+r"(d[11]),
          "+r"(d[12]),
          "+r"(d[13]),
          "+r"(d[14]),
          "+r"(d[15]),
          "+r"(d[16]),
          "+r"(d[17]),
          "+r"(d[18]),
          "+r"(d[19]),
          "+r"(d[20]),
          "+r"(d[21]),
          "+r"(d[22]),
          "+r"(d[23]),
          "+r"(d[24]),
          "+r"(d[25]),
          "+r"(d[26]),
          "+r"(d[27]),
          "+r"(d[28]),
          "+r"(d[29]),
          "+r"(d[30]),
          "+r"(d[31]),
          "+r"(d[32]),
          "+r"(d[33]),
          "+r"(d[34]),
          "+r"(d[35]),
          "+r"(d[36]),
          "+r"(d[37]),
          "+r"(d[38]),
          "+r"(d[39]),
          "+r"(d[40]),
          "+r"(d[41]),
          "+r"(d[42]),
          "+r"(d[43]),
          "+r"(d[44]),
          "+r"(d[45]),
          "+r"(d[46]),
          "+r"(d[47]),
          "+r"(d[48]),
          "+r"(d[49]),
          "+r"(d[50]),
          "+r"(d[51]),
          "+r"(d[52]),
          "+r"(d[53]),
          "+r"(d[54]),
          "+r"(d[55]),
          "+r"(d[56]),
          "+r"(d[57]),
          "+r"(d[58]),
          "+r"(d[59]),
          "+r"(d[60]),
          "+r"(d[61]),
          "+r"(d[62]),
          "+r"(d[63]),
          "+r"(d[64]),
          "+r"(d[65]),
          "+r"(d[66]),
          "+r"(d[67]),
          "+r"(d[68]),
          "+r"(d[69]),
          "+r"(d[70]),
          "+r"(d[71]),
          "+r"(d[72]),
          "+r"(d[73]),
          "+r"(d[74]),
          "+r"(d[75]),
          "+r"(d[76]),
          "+r"(d[77]),
          "+r"(d[78]),
          "+r"(d[79]),
          "+r"(d[80]),
          "+r"(d[81]),
          "+r"(d[82]),
          "+r"(d[83]),
          "+r"(d[84]),
          "+r"(d[85]),
          "+r"(d[86]),
          "+r"(d[87]),
          "+r"(d[88]),
          "+r"(d[89]),
          "+r"(d[90]),
          "+r"(d[91]),
          "+r"(d[92]),
          "+r"(d[93]),
          "+r"(d[94]),
          "+r"(d[95])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

}  // namespace bitnet_ext::cuda
