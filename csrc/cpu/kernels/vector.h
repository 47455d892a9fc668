// Float vectors of the instruction set's width.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "elementary.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DCCONV_SHUFFLES
#endif
#endif

namespace dcconv::cpu::DCCONV_ISA {

// Floats of a vector register, which the file of an instruction set says.
constexpr int64_t kLanes = DCCONV_LANES;

typedef float Vector __attribute__((vector_size(sizeof(float) * DCCONV_LANES)));

DC_HD Vector load_vector(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

DC_HD void store_vector(float* to, Vector v) {
  std::memcpy(to, &v, sizeof(v));
}

// The sum of term(0), ..., term(count - 1): 32 running sums whatever the instruction set, each of
// at most kLongest terms before it is put aside, added up pairwise. Equal terms round one way, so
// that a long running sum of them is wrong by its length.
template <class A, class Term>
DC_HD A lane_sum(int64_t count, const Term& term) {
  constexpr int64_t kWidth = 32, kLongest = 16;
  A totals[kWidth] = {};
  int64_t i = 0;
  while (i + kWidth <= count) {
    const int64_t stop = i + kLongest * kWidth < count ? i + kLongest * kWidth : count;
    A lanes[kWidth] = {};
    for (; i + kWidth <= stop; i += kWidth) {
#pragma omp simd
      for (int64_t j = 0; j < kWidth; ++j)
        lanes[j] += term(i + j);
    }
#pragma omp simd
    for (int64_t j = 0; j < kWidth; ++j)
      totals[j] += lanes[j];
  }
  A rest = 0;
  for (; i < count; ++i)
    rest += term(i);
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j)
      totals[j] += totals[j + half];
  return totals[0] + rest;
}

// The first `count` lanes, zeros behind.
DC_HD Vector load_lanes(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i)
    lanes[i] = from[i];
  return load_vector(lanes);
}

// Sums of neighbouring lanes: those of a, then those of b.
template <std::size_t... kLane>
DC_HD Vector neighbour_sums(Vector a, Vector b, std::index_sequence<kLane...>) {
#if defined(DCCONV_SHUFFLES)
  return __builtin_shufflevector(a, b, static_cast<int>(2 * kLane)...) +
         __builtin_shufflevector(a, b, static_cast<int>(2 * kLane + 1)...);
#else
  float both[2 * kLanes], sums[kLanes];
  store_vector(both, a);
  store_vector(both + kLanes, b);
  for (int64_t i = 0; i < kLanes; ++i)
    sums[i] = both[2 * i] + both[2 * i + 1];
  return load_vector(sums);
#endif
}

// The sum of all lanes of each of kLanes vectors, which are overwritten.
DC_HD Vector lane_sums(Vector* v) {
#pragma GCC unroll 4
  for (int64_t count = kLanes; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < count / 2; ++i)
      v[i] = neighbour_sums(
          v[2 * i], v[2 * i + 1], std::make_index_sequence<static_cast<std::size_t>(kLanes)>{}
      );
  return v[0];
}

}  // namespace dcconv::cpu::DCCONV_ISA
