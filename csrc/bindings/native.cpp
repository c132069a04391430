// The module bitnet_ext._native: facts about this CPU and this build. Nothing here takes a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cuda/heuristics.h"

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

// The choice the CUDA operators make for a product, as numbers. For tests and bug reports; needs no GPU.
py::dict product_plan(
    int64_t M, int64_t N, int64_t K, bool int8_weight, bool sm90, int num_sms, size_t shared_limit) {
  if (M < 1 || N < 1 || K < 1 || num_sms < 1) {
    throw py::value_error("product_plan: M, N, K and num_sms must be >= 1");
  }
  const WeightKind kind = int8_weight ? WeightKind::kInt8 : WeightKind::kTernary;
  const cuda::ProductKernel kernel = cuda::product_kernel(M, N, K, kind, sm90, num_sms, shared_limit);
  py::dict plan;
  plan["kernel"] = cuda::kProductKernelNames[static_cast<int>(kernel)];
  switch (kernel) {
    case cuda::ProductKernel::kGemv: {
      const cuda::GemvPlan p = cuda::gemv_plan(N, K, kind, num_sms);
      plan["warps"] = p.warps;
      plan["row_tiles"] = p.row_tiles;
      plan["depth"] = p.depth;
      plan["blocks"] = p.blocks;
      break;
    }
    case cuda::ProductKernel::kDecode: {
      const cuda::DecodePlan p = cuda::decode_plan(M, N, K, kind, num_sms, shared_limit);
      plan["warps"] = p.warps;
      plan["splits"] = p.splits;
      plan["row_tiles"] = p.row_tiles;
      plan["depth"] = p.depth;
      plan["blocks"] = p.blocks;
      plan["shared_bytes"] = p.shared_bytes;
      break;
    }
    case cuda::ProductKernel::kSm80Gemm: {
      const cuda::GemmTile tile = cuda::sm80_gemm_tile(M, N, num_sms);
      plan["features"] = cuda::tile_features(tile);
      plan["tokens"] = cuda::tile_tokens(tile);
      break;
    }
    case cuda::ProductKernel::kSm90Gemm: {
      const cuda::Sm90Plan p = cuda::sm90_plan(M, N, K, kind, num_sms);
      plan["features"] = p.features;
      plan["tokens"] = p.tokens;
      plan["blocks"] = p.blocks;
      plan["split_tiles"] = p.split_tiles;
      break;
    }
  }
  return plan;
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
  m.def("product_plan",
        &bitnet_ext::product_plan,
        py::arg("M"),
        py::arg("N"),
        py::arg("K"),
        py::kw_only(),
        py::arg("int8_weight") = false,
        py::arg("sm90") = true,
        py::arg("num_sms") = 132,
        py::arg("shared_limit") = 232448,
        "The kernel that a CUDA product of this shape gets, and how it divides the work; the defaults are an "
        "H200's.");
  m.def("build_info",
        &bitnet_ext::build_info,
        "version, torch (headers it was built with), compiler, cuda_archs (list), cuda_version (empty "
        "without CUDA).");
}
