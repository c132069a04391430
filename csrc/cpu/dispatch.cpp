#include "cpu/dispatch.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace bitnet_ext::cpu {
namespace {

const Kernels& table_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return avx2_kernels();
  if (isa == Isa::kAvx512) return avx512_kernels();
#endif
  (void)isa;
  return scalar_kernels();
}

// `source` begins the sentence of a failure.
const Kernels& table_named(const std::string& name, const std::string& source) {
  std::string accepted;
  bool known = false;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    known |= name == kIsaNames[i];
    if (!isa_supported(isa)) continue;
    if (name == kIsaNames[i]) return table_of(isa);
    accepted += (accepted.empty() ? "" : ", ") + std::string(kIsaNames[i]);
  }
  const char* why = known ? ", which this CPU does not support" : "";
  throw std::runtime_error(source + "; got '" + name + "'" + why + ", accepted here: " + accepted);
}

const Kernels& best_table() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_supported(static_cast<Isa>(i))) return table_of(static_cast<Isa>(i));
  }
  return scalar_kernels();
}

// Null until the first use. Two threads that come first together choose the same table.
std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    const char* forced = std::getenv("BITNET_EXT_CPU_ISA");
    table = forced && *forced
                ? &table_named(forced,
                               "bitnet_ext: the environment variable BITNET_EXT_CPU_ISA must name an "
                               "instruction set")
                : &best_table();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

std::string cpu_isa() {
  return kernels().name;
}

void set_cpu_isa(std::string isa) {
  current.store(&table_named(isa, "bitnet_ext._set_cpu_isa: isa must name an instruction set"),
                std::memory_order_release);
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

}  // namespace bitnet_ext::cpu
