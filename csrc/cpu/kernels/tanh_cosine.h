// y = alpha tanh(b / rho) u / (a b) + bias on vectors, from u and s = b^2: the default operator
// without a root, since tanh(z) / z is a ratio of polynomials in z^2 = s / rho^2.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/registers.h"

namespace dcconv::cpu::DCCONV_ISA {

// DCCONV_FMA: the files of one instruction set say it, since a compiler need not define __FMA__
// where a pragma chose the target.
#if defined(DCCONV_FMA) || defined(__FMA__) || defined(__aarch64__)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// Beyond this (b / rho)^2 tanh is 1, and the ratio no longer holds.
constexpr float kSaturated = 81.0f;

class TanhCosine {
public:
  using Vector = Lanes<float>::Vector;

  // Of as many filters as a vector has lanes.
  TanhCosine(const FilterScales& f, int64_t filter) : bias_{} {
    load_vector<float>(scale_, f.scale + filter);
    load_vector<float>(slope_, f.slope + filter);
    load_vector<float>(factor_, f.factor + filter);
    if (f.bias != nullptr)
      load_vector<float>(bias_, f.bias + filter);
    most_ = f.most[filter / kScaleGroup];
  }

  // Whether tanh may be 1 where s is as large as this.
  DC_HD bool saturates(float s) const { return s * most_ > kSaturated; }

  DC_HD bool saturates(const Vector& s) const {
    const Vector t = s * scale_;
#if DCCONV_LANES == 16
    return _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(kSaturated), _CMP_GT_OQ) != 0;
#else
    bool any = false;
    for (int64_t i = 0; i < Lanes<float>::vector; ++i)
      any |= t[i] > kSaturated;
    return any;
#endif
  }

  template <bool kSaturates>
  DC_HD Vector value(Vector u, Vector s) const {
    const Vector t = s * scale_, p = tanh_numerator(t), q = tanh_denominator(t);
    // The divider works beside the multipliers: an estimate with Newton's method takes longer.
    Vector y = u * slope_ * p * q / (q * q + t * p * p);
    if constexpr (kSaturates) {
      Vector b, inverse;
      root_of<float>(s, b, inverse);
      y = t > kSaturated ? u * factor_ * inverse : y;
    }
    return y + bias_;
  }

private:
  Vector scale_, slope_, factor_, bias_;
  float most_;
};

}  // namespace dcconv::cpu::DCCONV_ISA
