// Chooses the instruction set of the CPU kernels: the best one that the processor has, or the one
// asked for by DCCONV_CPU_ISA or set_cpu_isa.

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/tasks.h"

namespace dcconv::cpu {
namespace {

using Table = const Kernels& (*)(Dtype);

struct Isa {
  const char* name;
  Table table;
};

// From plain to best.
std::vector<Isa> available() {
  std::vector<Isa> found{{"baseline", baseline::kernels}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back({"avx2", avx2::kernels});
  if (found.size() == 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", avx512::kernels});
#endif
  return found;
}

Table find(const std::string& name) {
  std::string known;
  for (const Isa& isa : available()) {
    if (name == isa.name)
      return isa.table;
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  fail("the instruction set must be one of ", known, ", got '", name, "'");
}

Table initial() {
  const char* wanted = std::getenv("DCCONV_CPU_ISA");
  return wanted == nullptr || *wanted == '\0' ? available().back().table : find(wanted);
}

std::atomic<Table>& chosen() {
  static std::atomic<Table> table{initial()};
  return table;
}

std::string cpu_isa() {
  return kernels(Dtype::f32).isa;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : available())
    names.emplace_back(isa.name);
  return names;
}

void set_cpu_isa(std::string name) {
  chosen() = find(name);
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  return chosen().load()(dtype);
}

}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dcconv::cpu::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&dcconv::cpu::cpu_isas));
  m.impl("set_cpu_isa", TORCH_BOX(&dcconv::cpu::set_cpu_isa));
}
