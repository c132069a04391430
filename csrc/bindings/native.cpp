// The module bitnet_ext._native, for tests and bug reports. Nothing here takes a tensor. The package runs
// without it: a wheel serves Python versions for which it holds none (docs/release.md).
#include <pybind11/pybind11.h>

#include "cuda/heuristics.h"

namespace py = pybind11;

namespace bitnet_ext {
namespace {

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

}  // namespace
}  // namespace bitnet_ext

PYBIND11_MODULE(_native, m) {
  m.doc() = "The choices of bitnet_ext that need no GPU to be looked at.";
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
}
