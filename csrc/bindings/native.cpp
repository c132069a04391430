// The module bitnet_ext._native: facts about this CPU and this build. Nothing here takes a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/features.h"

namespace py = pybind11;

namespace bitnet_ext {
namespace {

std::map<std::string, bool> cpu_features() {
  const cpu::Features& f = cpu::features();
  return {{"avx2", f.avx2},
          {"fma", f.fma},
          {"f16c", f.f16c},
          {"avx512f", f.avx512f},
          {"avx512bw", f.avx512bw},
          {"avx512vl", f.avx512vl},
          {"avx512dq", f.avx512dq},
          {"avx512_vnni", f.avx512_vnni}};
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    if (cpu::isa_supported(static_cast<cpu::Isa>(i))) names.emplace_back(cpu::kIsaNames[i]);
  }
  return names;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// "80-real;90a-real" -> ["80-real", "90a-real"]; a comma separates too, because CMake treats a semicolon as
// its own.
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::string part;
  for (const char c : list + ";") {
    if (c != ';' && c != ',') {
      part += c;
    } else if (!part.empty()) {
      parts.push_back(part);
      part.clear();
    }
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = std::string(BITNET_EXT_VERSION);
  info["torch"] = std::string(BITNET_EXT_TORCH_VERSION);
  info["compiler"] = compiler();
  info["cuda_archs"] = split(BITNET_EXT_CUDA_ARCHS);
  info["cuda_version"] = std::string(BITNET_EXT_CUDA_VERSION);
  return info;
}

}  // namespace
}  // namespace bitnet_ext

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about this CPU and this build of bitnet_ext.";
  m.def("cpu_features",
        &bitnet_ext::cpu_features,
        "Instruction set extensions that the CPU kernels look at: name -> whether this CPU has it.");
  m.def("cpu_isas", &bitnet_ext::cpu_isas, "Instruction sets with kernels that this CPU runs, best last.");
  m.def("build_info",
        &bitnet_ext::build_info,
        "version, torch (headers it was built with), compiler, cuda_archs (list), cuda_version (empty "
        "without CUDA).");
}
