#include "cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bitnet_ext::cpu {
namespace {

Features detect() {
  Features found = {};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2");
  found.fma = __builtin_cpu_supports("fma");
  found.avx512f = __builtin_cpu_supports("avx512f");
  found.avx512bw = __builtin_cpu_supports("avx512bw");
  found.avx512vl = __builtin_cpu_supports("avx512vl");
  found.avx512dq = __builtin_cpu_supports("avx512dq");
  found.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  // Not every compiler knows the name "f16c": leaf 1, ECX bit 29. It uses the registers of AVX2.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  found.f16c = found.avx2 && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
#endif
  return found;
}

}  // namespace

const Features& features() {
  static const Features found = detect();
  return found;
}

bool isa_supported(Isa isa) {
  const Features& f = features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512_vnni;
  }
  return false;
}

}  // namespace bitnet_ext::cpu
