// Schemas of all ops, the function lists, and the module. Each device folder registers its own
// implementations.

#include <Python.h>

#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "functions.h"

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

// clang-format off
#define DC_GEOMETRY \
  "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode"
#define DC_OPERATOR \
  "str magnitude, str angular, str weighting, float alpha, float beta, float power, float delta"
#define DC_EPILOGUE \
  "Tensor a, Tensor map, Tensor? bias, Tensor? radius, Tensor? mean, Tensor? k, " \
  "SymInt[] input_size, SymInt[] kernel_size, " DC_GEOMETRY ", " DC_OPERATOR ", float eps, " \
  "bool map_is_norm, bool channels_last"
#define DC_GRAD_INPUT \
  "Tensor x, Tensor t, Tensor norm_map, Tensor? sigma, SymInt[] kernel_size, " DC_GEOMETRY
// clang-format on

STABLE_TORCH_LIBRARY(dcconv, m) {
  // What the arguments mean: dcconv/problem.py. norm_map is 1-d, in the kernels' own order.
  m.def(
      "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? radius, Tensor? norm_mean, "
      "Tensor? k, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
      "str padding_mode, str magnitude, str angular, str weighting, float alpha, float beta, "
      "float power, float eps, float delta, str norm, bool keep_dot) "
      "-> (Tensor y, Tensor norm_map, Tensor mean, Tensor dot)"
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
  // Plan A: the passes between the library convolutions, composed in dcconv/plan_a.py. Tensors are
  // dense in the layout channels_last says; maps are 1-d, [n, pixels, groups] or, in contiguous
  // layout, [n, groups, pixels]. mean is the factor of the radius, absent for 1.

  // map: the norms b and their mean with batch_mean, else the sums of squares per input pixel.
  m.def(
      "conv2d_norms(Tensor x, Tensor weight, " DC_GEOMETRY ", float eps, bool batch_mean, "
      "bool channels_last) -> (Tensor a, Tensor map, Tensor mean)"
  );
  // input_size: rows and columns of x. norm_map: b, [0] when map already is b.
  m.def("conv2d_epilogue(Tensor u, " DC_EPILOGUE ") -> (Tensor y, Tensor norm_map)");
  // y is written over u.
  m.def("conv2d_epilogue_(Tensor(a!) u, " DC_EPILOGUE ") -> Tensor norm_map");
  // sums: bits 1 rho, 2 a, 4 k, 8 bias. parts: [kinds in sums, rows, o], a partial sum per row.
  m.def(
      "conv2d_grad_dot(Tensor grad_y, Tensor kept, Tensor norm_map, Tensor a, Tensor? radius, "
      "Tensor? mean, Tensor? k, SymInt groups, " DC_OPERATOR ", str kept_is, bool wants_t, "
      "int sums, SymInt rows, bool channels_last) -> (Tensor grad_u, Tensor t, Tensor parts)"
  );
  // needs: as in conv2d_backward. sigma: what the mean norm adds to t b, [0] without barrier.
  m.def(
      "conv2d_grad_filters(Tensor parts, Tensor? library_grad, Tensor weight, Tensor a, "
      "Tensor? radius, Tensor? mean, Tensor? k, SymInt map_count, int sums, bool barrier, "
      "int needs) -> (Tensor grad_weight, Tensor grad_bias, Tensor grad_radius, "
      "Tensor grad_mean, Tensor grad_k, Tensor sigma)"
  );
  // library_grad is of the padded input where padded.
  m.def(
      "conv2d_grad_input(Tensor library_grad, " DC_GRAD_INPUT ", bool padded, "
      "bool channels_last) -> Tensor grad_x"
  );
  // grad_x is written over library_grad, which is of x's size.
  m.def("conv2d_grad_input_(Tensor(a!) library_grad, " DC_GRAD_INPUT ", bool channels_last) -> ()");
  // Norm-free operators: scaled = alpha weight, over a with divide.
  m.def(
      "filter_scale(Tensor weight, float alpha, float eps, bool divide) "
      "-> (Tensor scaled, Tensor a)"
  );
  m.def(
      "filter_scale_grad(Tensor library_grad, Tensor weight, Tensor a, float alpha, bool divide) "
      "-> Tensor grad_weight"
  );
  m.def("window_norm(Tensor x, SymInt[] kernel_size, " DC_GEOMETRY ", float eps) -> Tensor b");
  m.def(
      "window_norm_grad(Tensor grad_b, Tensor x, Tensor b, SymInt[] kernel_size, " DC_GEOMETRY
      ") -> Tensor grad_x"
  );
  m.def("magnitudes() -> str[]");
  m.def("angulars() -> str[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("set_cpu_isa(str isa) -> ()");
  // Images per chunk of the CPU kernels, 0 for the rule: for tests and measurements.
  m.def("set_cpu_chunk(int images) -> ()");
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
