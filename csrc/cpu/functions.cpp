// Function values and derivatives of the shipping kernels as ops, for tests and the accuracy
// benchmark.

#include <string>

#include "cpu/library.h"
#include "problem.h"

namespace dcconv {
namespace cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> magnitude_grad(
    std::string magnitude,
    std::string weighting,
    Tensor a,
    Tensor b,
    Tensor rho,
    double alpha,
    double beta
) {
  const Dtype dtype = dtype_of(b);
  STD_TORCH_CHECK(
      dtype == Dtype::f64 || dtype == Dtype::f32, "dcconv: b must be float32 or float64"
  );
  for (const Tensor& t : {a, b, rho})
    STD_TORCH_CHECK(
        t.numel() == b.numel() && t.scalar_type() == b.scalar_type() && t.is_contiguous(),
        "dcconv: a, b and rho must be alike and contiguous"
    );
  std::array<Tensor, 4> out;
  for (Tensor& t : out)
    t = torch::stable::empty_like(b);
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
  const Dtype dtype = dtype_of(c);
  STD_TORCH_CHECK(
      dtype == Dtype::f64 || dtype == Dtype::f32, "dcconv: c must be float32 or float64"
  );
  STD_TORCH_CHECK(
      k.numel() == c.numel() && k.scalar_type() == c.scalar_type() && k.is_contiguous() &&
          c.is_contiguous(),
      "dcconv: c and k must be alike and contiguous"
  );
  std::array<Tensor, 4> out;
  for (Tensor& t : out)
    t = torch::stable::empty_like(c);
  FunctionParams p{};
  p.op = {
      0, index_of(portable::Angulars{}, angular, "angular function"), false, 1.0, 1.0, power, delta
  };
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
}  // namespace cpu
}  // namespace dcconv

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("magnitude_grad", TORCH_BOX(&dcconv::cpu::magnitude_grad));
  m.impl("angular_grad", TORCH_BOX(&dcconv::cpu::angular_grad));
}
