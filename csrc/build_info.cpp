// Facts about this build and this CPU, for bug reports. As operators, because these serve every Python.
#include "build_info.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/features.h"

namespace bitnet_ext {
namespace {

std::string build_info() {
  return kBuildInfo;
}

// {"isas": [those with kernels that this CPU runs, the best last], "features": {"avx2": true, ...}}
std::string cpu_info() {
  std::string isas;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    if (!cpu::isa_supported(static_cast<cpu::Isa>(i))) continue;
    isas += std::string(isas.empty() ? "\"" : ", \"") + cpu::kIsaNames[i] + "\"";
  }
  const cpu::Features& f = cpu::features();
  std::string features;
  const auto add = [&features](const char* name, bool value) {
    features += std::string(features.empty() ? "\"" : ", \"") + name + "\": " + (value ? "true" : "false");
  };
  add("avx2", f.avx2);
  add("fma", f.fma);
  add("f16c", f.f16c);
  add("avx512f", f.avx512f);
  add("avx512bw", f.avx512bw);
  add("avx512vl", f.avx512vl);
  add("avx512dq", f.avx512dq);
  add("avx512_vnni", f.avx512_vnni);
  return "{\"isas\": [" + isas + "], \"features\": {" + features + "}}";
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&build_info));
  m.impl("_cpu_info", TORCH_BOX(&cpu_info));
}

}  // namespace
}  // namespace bitnet_ext
