// Chooses the instruction set of the CPU kernels: the best one that the processor has, or the one
// asked for by DCCONV_CPU_ISA or set_cpu_isa. A build for one machine (DCCONV_BUILD=local) is
// linked with one of them alone.

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/tasks.h"

namespace dcconv::cpu {

// Weak: null where the file was not compiled.
namespace baseline {
__attribute__((weak)) const Kernels& kernels(Dtype dtype, bool float_library);
}
namespace avx2 {
__attribute__((weak)) const Kernels& kernels(Dtype dtype, bool float_library);
}
namespace avx512 {
__attribute__((weak)) const Kernels& kernels(Dtype dtype, bool float_library);
}

namespace {

using Table = const Kernels& (*)(Dtype, bool);

struct Isa {
  const char* name;
  Table table;
};

// What the processor has, from plain to best; of those that were not compiled the table is null.
std::vector<Isa> known() {
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

std::vector<Isa> available() {
  std::vector<Isa> found;
  for (const Isa& isa : known())
    if (isa.table != nullptr)
      found.push_back(isa);
  return found;
}

Table find(const std::string& name) {
  std::string names;
  for (const Isa& isa : available()) {
    if (name == isa.name)
      return isa.table;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  for (const Isa& isa : known())
    if (name == isa.name)
      fail(
          "the instruction set must be one that was compiled (DCCONV_BUILD=local: ",
          names,
          "), got '",
          name,
          "'"
      );
  fail("the instruction set must be one of ", names, ", got '", name, "'");
}

Table initial() {
  const char* wanted = std::getenv("DCCONV_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0')
    return find(wanted);
  const std::vector<Isa> found = available();
  DCCONV_CHECK(!found.empty(), "the CPU kernels were compiled for another processor alone");
  return found.back().table;
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

const Kernels& kernels(Dtype dtype, bool float_library) {
  return chosen().load()(dtype, float_library);
}

}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dcconv::cpu::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&dcconv::cpu::cpu_isas));
  m.impl("set_cpu_isa", TORCH_BOX(&dcconv::cpu::set_cpu_isa));
}
