// Assembles the kernel tables of one instruction set; included once by each isa_*.cpp through the
// file that defines DCCONV_ISA and, where needed, switches the target on.

#include "cpu/kernels/affine_relu.h"
#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/filter.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/grad_dot.h"
#include "cpu/kernels/grad_input.h"
#include "cpu/kernels/pixel_sumsq.h"
#include "cpu/kernels/window.h"

#define DCCONV_STRING_OF(x) #x
#define DCCONV_STRING(x) DCCONV_STRING_OF(x)

namespace dcconv::cpu::DCCONV_ISA {

// Compiled in depthwise_*.cpp.
template <class T, class A>
void depthwise_forward(const DepthwiseParams& p, int64_t begin, int64_t end);
template <class T, class A>
void depthwise_backward(const DepthwiseGradParams& p, int64_t begin, int64_t end);

// Derivatives come as dh/db = (d + h) / b, dh/drho, dh/da after the value.
template <class A>
void magnitude_function(const FunctionParams& p) {
  const A *a = static_cast<const A*>(p.a), *b = static_cast<const A*>(p.b);
  const A* rho = static_cast<const A*>(p.rho);
  A *h = static_cast<A*>(p.out0), *h_b = static_cast<A*>(p.out1);
  A *h_rho = static_cast<A*>(p.out2), *h_a = static_cast<A*>(p.out3);
  const auto value =
      pick_magnitude_value<A, true>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto grad =
      pick_magnitude_grad<A, true>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  for (int64_t i = 0; i < p.count; ++i) {
    const A inverse = A(1) / rho[i];
    MagnitudeRow<A> row{};
    row.count = 1;
    row.a = a + i;
    row.b = b + i;
    row.rho = rho + i;
    row.inverse_rho = &inverse;
    row.constants = constants_of<A>(p.op);
    row.times_a = p.op.times_a;
    A d = 0, unused = 0;
    row.h = &unused;
    row.d = &d;
    row.parameters = true;
    row.h_rho = h_rho + i;
    row.h_a = h_a + i;
    grad(row);
    h_b[i] = (d + unused) / b[i];
    row.h = h + i;
    value(row);
  }
}

template <class A, class... G>
void angular_function_of(const FunctionParams& p, TypeList<G...>) {
  using Value = AngularGrad<A> (*)(A, A, const Constants<A>&);
  using Inverse = A (*)(A);
  static constexpr Value grads[] = {+[](A c, A k, const Constants<A>& s) {
    AngularGrad<A> m = G::grad(c, k, s);
    m.g = G::value(c, k, s);
    return m;
  }...};
  static constexpr Inverse inverses[] = {+[](A g) { return G::inverse(g); }...};
  const A *c = static_cast<const A*>(p.c), *k = static_cast<const A*>(p.k);
  for (int64_t i = 0; i < p.count; ++i) {
    const AngularGrad<A> m = grads[p.op.angular](c[i], k[i], constants_of<A>(p.op));
    static_cast<A*>(p.out0)[i] = m.g;
    static_cast<A*>(p.out1)[i] = m.g_c;
    static_cast<A*>(p.out2)[i] = m.g_k;
    static_cast<A*>(p.out3)[i] = inverses[p.op.angular](m.g);
  }
}

template <class A>
void angular_function(const FunctionParams& p) {
  angular_function_of<A>(p, Angulars{});
}

template <class T, class U, class A>
constexpr Kernels make_table() {
  return {
      DCCONV_STRING(DCCONV_ISA),
      sizeof(A),
      pixel_sumsq<T, A>,
      affine_relu<T, A>,
      window_norm<A>,
      window_transposed<A>,
      epilogue<T, U, A>,
      grad_dot<T, U, A>,
      grad_input<T, U, A>,
      filter_norm<T, U, A>,
      filter_grad<T, A>,
      finish_t<A>,
      accumulate<U, A>,
      round_to<U, T>,
      depthwise_forward<T, A>,
      depthwise_backward<T, A>,
      magnitude_function<A>,
      angular_function<A>,
      gemm,
      inner_products,
      pack_panels,
      kPanel,
  };
}

const Kernels& kernels(Dtype dtype, bool float_library) {
  // In the order of Dtype; behind them bfloat16 with library convolutions in float.
  static constexpr Kernels tables[kDtypes + 1] = {
      make_table<double, double, double>(),
      make_table<float, float, float>(),
      make_table<BFloat16, BFloat16, float>(),
      make_table<Half, float, float>(),
      make_table<BFloat16, float, float>(),
  };
  const bool other = float_library && dtype == Dtype::bf16;
  return tables[other ? kDtypes : static_cast<int>(dtype)];
}

}  // namespace dcconv::cpu::DCCONV_ISA
