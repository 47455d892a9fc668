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

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

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

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
