// Vectors of compute values from and to storage values.
#pragma once

#include <cstring>

#include "cpu/kernels/registers.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

template <class A>
DC_HD void load_pixels(typename Lanes<A>::Vector& v, const A* p) {
  load_vector<A>(v, p);
}

template <class A>
DC_HD void load_pixels(typename Lanes<A>::Vector& v, const BFloat16* p) {
  static_assert(sizeof(A) == sizeof(float));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  v = (typename Lanes<A>::Vector)(__builtin_convertvector(halves, Words) << 16);
}

// As load of Half.
template <class A>
DC_HD void load_pixels(typename Lanes<A>::Vector& v, const Half* p) {
  static_assert(sizeof(A) == sizeof(float));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef int32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef typename Lanes<A>::Vector Floats;
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const Words bits = __builtin_convertvector(halves, Words), size = (bits & 0x7fff) << 13;
  const Words finite = (Words)((Floats)size * 0x1.0p112f), special = finite | 0x7f800000;
  v = (Floats)((size >= 0x0f800000 ? special : finite) | (bits & 0x8000) << 16);
}

DC_HD void store_pixels(float* p, const Lanes<float>::Vector& v) {
  store_vector<float>(p, v);
}

// As Store<BFloat16> rounds.
DC_HD void store_pixels(BFloat16* p, const Lanes<float>::Vector& v) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = (Words)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = Words{} + 0x7fc0u;
  const Halves halves =
      __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
  std::memcpy(p, &halves, sizeof(halves));
}

DC_HD void store_pixels(Half* p, const Lanes<float>::Vector& v) {
  constexpr int64_t count = Lanes<float>::vector;
  float values[count];
  store_vector<float>(values, v);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    p[i] = Store<Half>::from(values[i]);
}

}  // namespace dcconv::cpu::DCCONV_ISA
