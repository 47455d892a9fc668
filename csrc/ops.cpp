// Schemas of all ops, the function lists, and the module. Each device folder registers its own
// implementations.

#include <Python.h>

#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "functions.h"
#include "schemas.h"

namespace dcconv {
namespace {

using namespace portable;

template <class... F>
std::vector<std::string> names_of(TypeList<F...>) {
  return {F::name...};
}

std::vector<std::string> magnitudes() {
  return names_of(Magnitudes{});
}
std::vector<std::string> angulars() {
  return names_of(Angulars{});
}

}  // namespace
}  // namespace dcconv

STABLE_TORCH_LIBRARY(dcconv, m) {
  // What the arguments mean: dcconv/operator/records.py. norm_map is 1-d, in the kernels' own
  // order. sums: of the squares of x per pixel and group, laid out as norm_map and in compute
  // dtype, from whoever wrote x; absent where the op finds them itself.
  m.def(
      "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? radius, Tensor? norm_mean, "
      "Tensor? k, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
      "str padding_mode, str magnitude, str angular, str weighting, float alpha, float beta, "
      "float power, float eps, float delta, str norm, bool keep_dot, bool keep_map=True, "
      "Tensor? sums=None) -> (Tensor y, Tensor norm_map, Tensor mean, Tensor dot)"
  );
  m.def(
      "conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor kept, Tensor norm_map, "
      "Tensor mean, Tensor? radius, Tensor? norm_mean, Tensor? k, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode, str magnitude, "
      "str angular, str weighting, float alpha, float beta, float power, float eps, float delta, "
      "str norm, bool norm_grad, str kept_is, int needs) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_radius, "
      "Tensor grad_norm_mean, Tensor grad_k)"
  );
  m.def(
      "patch_norm_forward(Tensor x, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str padding_mode, float eps) -> Tensor"
  );
  m.def(
      "patch_norm_backward(Tensor grad_b, Tensor x, Tensor b, SymInt[] kernel_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode) "
      "-> Tensor"
  );
  dcconv::define_passes(m);
  dcconv::define_fused(m);
  m.def("magnitudes() -> str[]");
  m.def("angulars() -> str[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("set_cpu_isa(str isa) -> ()");
  // Images per chunk of the CPU kernels, 0 for the rule: for tests and measurements.
  m.def("set_cpu_chunk(int images) -> ()");
  // Whether PyTorch's library convolves bfloat16 itself on this processor, or in float32.
  m.def("set_cpu_bfloat16(bool by_library) -> ()");
  // auto, library or fused (csrc/cpu/strategies.h), for the calls of this thread: for tests and
  // measurements. Calls without fused kernels go around the library's convolution under fused as
  // well.
  m.def("set_cpu_strategy(str strategy) -> ()");
  // What the thread's latest call took, library or fused; empty before the first.
  m.def("cpu_strategy_taken() -> str");
  // What a call would take forward and backward.
  m.def(
      "cpu_strategies(Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] "
      "dilation, "
      "SymInt groups, str padding_mode, str magnitude, str angular, str weighting) -> str[]"
  );
  // Function values and derivatives, for tests and the accuracy benchmark.
  m.def(
      "magnitude_grad(str magnitude, str weighting, Tensor a, Tensor b, Tensor rho, float alpha, "
      "float beta) -> (Tensor h, Tensor h_b, Tensor h_rho, Tensor h_a)"
  );
  m.def(
      "angular_grad(str angular, Tensor c, Tensor k, float power, float delta) "
      "-> (Tensor g, Tensor g_c, Tensor g_k, Tensor c)"
  );
}

STABLE_TORCH_LIBRARY_IMPL(dcconv, CompositeExplicitAutograd, m) {
  m.impl("magnitudes", TORCH_BOX(&dcconv::magnitudes));
  m.impl("angulars", TORCH_BOX(&dcconv::angulars));
}

// Importing dcconv._C runs the registrations above; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr
  };
  return PyModule_Create(&module);
}
