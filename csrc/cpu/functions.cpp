// Function values and derivatives of the shipping kernels as ops, for tests and the accuracy
// benchmark.

#include <string>

#include "arguments.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace dcconv::cpu {
namespace {

Dtype argument_type(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  DCCONV_CHECK(
      type == ScalarType::Double || type == ScalarType::Float,
      name,
      " must have dtype float32 or float64, got ",
      name_of(type)
  );
  return dtype_of(t);
}

void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_sizes(t, sizes_of(like), name);
  check_dtype(t, like.scalar_type(), name);
  DCCONV_CHECK(t.is_contiguous(), name, " must be contiguous, got strides ", list_of(t.strides()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> magnitude_grad(
    std::string magnitude,
    std::string weighting,
    Tensor a,
    Tensor b,
    Tensor rho,
    double alpha,
    double beta
) {
  const Dtype dtype = argument_type(b, "b");
  check_like(a, b, "a");
  check_like(b, b, "b");
  check_like(rho, b, "rho");
  std::array<Tensor, 4> out;
  for (Tensor& t : out)
    t = empty(sizes_of(b), b.scalar_type());
  FunctionParams p{};
  p.op = {magnitude_index(magnitude, weighting), 0, weighting == "linear", alpha, beta, 1.0, 1.0};
  p.count = b.numel();
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.rho = rho.const_data_ptr();
  p.out0 = out[0].mutable_data_ptr();
  p.out1 = out[1].mutable_data_ptr();
  p.out2 = out[2].mutable_data_ptr();
  p.out3 = out[3].mutable_data_ptr();
  kernels(dtype).magnitude(p);
  return {out[0], out[1], out[2], out[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
angular_grad(std::string angular, Tensor c, Tensor k, double power, double delta) {
  const Dtype dtype = argument_type(c, "c");
  check_like(c, c, "c");
  check_like(k, c, "k");
  std::array<Tensor, 4> out;
  for (Tensor& t : out)
    t = empty(sizes_of(c), c.scalar_type());
  FunctionParams p{};
  p.op = {0, angular_index(angular), false, 1.0, 1.0, power, delta};
  p.count = c.numel();
  p.c = c.const_data_ptr();
  p.k = k.const_data_ptr();
  p.out0 = out[0].mutable_data_ptr();
  p.out1 = out[1].mutable_data_ptr();
  p.out2 = out[2].mutable_data_ptr();
  p.out3 = out[3].mutable_data_ptr();
  kernels(dtype).angular(p);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace
}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("magnitude_grad", TORCH_BOX(&dcconv::cpu::magnitude_grad));
  m.impl("angular_grad", TORCH_BOX(&dcconv::cpu::angular_grad));
}
