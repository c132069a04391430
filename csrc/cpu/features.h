// What this CPU can do, read once from cpuid. Compiled with baseline flags and used before any kernel is
// chosen.
#pragma once

namespace bitnet_ext::cpu {

// Every member is false on a CPU that is not x86-64.
struct Features {
  bool avx2, fma, f16c;
  bool avx512f, avx512bw, avx512vl, avx512dq, avx512_vnni;
};

const Features& features();

// Instruction sets with kernels of their own.
enum class Isa { kScalar, kAvx2, kAvx512 };
constexpr int kIsaCount = 3;
constexpr const char* kIsaNames[kIsaCount] = {"scalar", "avx2", "avx512"};

// True when this build holds kernels for `isa` and this CPU and its operating system can run them.
bool isa_supported(Isa isa);

}  // namespace bitnet_ext::cpu
