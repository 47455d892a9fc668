// y = alpha tanh(b / rho) u / (a b) + bias on vectors, from u and s = b^2: the default operator
// without a root, since tanh(z) / z is a ratio of polynomials in z^2 = s / rho^2.
#pragma once

#include "cpu/depthwise/lanes.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

// DCCONV_FMA: the files of one instruction set say it, since a compiler need not define __FMA__
// where a pragma chose the target.
#if defined(DCCONV_FMA) || defined(__FMA__) || defined(__aarch64__)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// n / d for d in [1, 2^100]: the estimate with one step of Newton's method is within an ulp.
DC_HD Lanes<float>::Vector ratio(Lanes<float>::Vector n, Lanes<float>::Vector d) {
#if DCCONV_LANES == 16
  const __m512 y = _mm512_maskz_rcp14_ps(0xffff, (__m512)d), q = _mm512_mul_ps((__m512)n, y);
  const __m512 rest = _mm512_fnmadd_ps(q, (__m512)d, (__m512)n);
  return (Lanes<float>::Vector)_mm512_fmadd_ps(rest, y, q);
#else
  return n / d;
#endif
}

// y = u factor / b where t > 81 or NaN: tanh is 1.
DC_HD void saturate(
    const Lanes<float>::Vector& t,
    const Lanes<float>::Vector& s,
    const Lanes<float>::Vector& u_factor,
    Lanes<float>::Vector& y
) {
#if DCCONV_LANES == 16
  if (_mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(81.0f), _CMP_NLE_UQ) == 0)
    return;
#endif
  Lanes<float>::Vector b, inverse;
  root_of<float>(s, b, inverse);
  y = t <= 81.0f ? y : u_factor * inverse;
}

template <class Wanted, class... Types>
constexpr int index_in(TypeList<Types...>) {
  int index = 0, found = -1;
  ((found = std::is_same_v<Wanted, Types> ? index : found, ++index), ...);
  return found;
}

class TanhCosine {
public:
  using Vector = Lanes<float>::Vector;

  static bool is(const Operator& op) {
    return op.magnitude == index_in<Tanh>(Magnitudes{}) &&
           op.angular == index_in<Cosine>(Angulars{});
  }

  TanhCosine(const BlockFilters<float>& f, int64_t lane, const Operator& op) : bias_{} {
    load_vector<float>(inverse_rho_, f.inverse_rho + lane);
    load_vector<float>(factor_, f.inverse_a + lane);
    factor_ *= static_cast<float>(op.alpha);
    if (op.times_a) {
      Vector a;
      load_vector<float>(a, f.a + lane);
      factor_ *= a;
    }
    if (f.bias != nullptr)
      load_vector<float>(bias_, f.bias + lane);
  }

  // y[i] over dots[i].
  template <int kRun>
  DC_HD void apply(Vector (&dots)[kRun], const Vector (&sums)[kRun]) const {
    const Vector scale = inverse_rho_ * inverse_rho_, slope = 2.0f * factor_ * inverse_rho_;
#pragma GCC unroll 8
    for (int i = 0; i < kRun; ++i) {
      const Vector t = sums[i] * scale, p = tanh_numerator(t), q = tanh_denominator(t);
      Vector y = ratio(dots[i] * slope * p * q, q * q + t * p * p);
      saturate(t, sums[i], dots[i] * factor_, y);
      dots[i] = y + bias_;
    }
  }

private:
  Vector inverse_rho_, factor_, bias_;
};

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
