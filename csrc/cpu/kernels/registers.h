// Registers of compute values, `Lanes<A>::count` of which fill the 64 bytes of a block.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels/depthwise_params.h"
#include "elementary.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Bytes of one register.
constexpr int64_t kVectorBytes = 4 * DCCONV_LANES;

template <class A>
struct Lanes {
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t count = kLaneBytes / int64_t{sizeof(A)};
  static constexpr int64_t vector = kVectorBytes / int64_t{sizeof(A)};
};

template <class A>
DC_HD void load_vector(typename Lanes<A>::Vector& v, const A* p) {
  std::memcpy(&v, p, sizeof(v));
}

template <class A>
DC_HD void store_vector(A* p, const typename Lanes<A>::Vector& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Of the instruction that classifies: +0, -0 and +infinity.
constexpr int kZeroOrInfinity = 0x02 | 0x04 | 0x08;

// b = sqrt(s) and 1 / b. The estimate with one step of Newton's method is within 2 ulp and takes a
// third of the time of root and division; zero and infinity, which it does not know, keep b = s.
template <class A>
DC_HD void root_of(
    const typename Lanes<A>::Vector& s,
    typename Lanes<A>::Vector& b,
    typename Lanes<A>::Vector& inverse
) {
#if DCCONV_LANES == 16
  if constexpr (sizeof(A) == sizeof(float)) {
    const __m512 v = (__m512)s, y = _mm512_maskz_rsqrt14_ps(0xffff, v), half = _mm512_set1_ps(0.5f);
    const __mmask16 usual = _knot_mask16(_mm512_fpclass_ps_mask(v, kZeroOrInfinity));
    const __m512 root = _mm512_mask_mul_ps(v, usual, v, y);
    // (1 - root y) / 2, what the estimate is wrong by
    const __m512 rest = _mm512_fnmadd_ps(root, _mm512_mul_ps(half, y), half);
    b = (typename Lanes<A>::Vector)_mm512_mask_fmadd_ps(root, usual, rest, root);
    inverse = (typename Lanes<A>::Vector)_mm512_mask_fmadd_ps(y, usual, rest, y);
    return;
  }
#endif
  for (int64_t i = 0; i < Lanes<A>::vector; ++i)
    b[i] = sqrt_of(s[i]);
  inverse = A(1) / b;
}

}  // namespace dcconv::cpu::DCCONV_ISA
