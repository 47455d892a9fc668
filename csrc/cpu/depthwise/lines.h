// Elementwise work on tiles: consecutive positions of one block, all values in the first-level
// cache.
#pragma once

#include "cpu/depthwise/band.h"
#include "cpu/rows.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

// Elements of a tile.
constexpr int64_t kLineTile = 512;

// The parameters of a block, one per element of a tile where lanes are filters.
template <class A>
struct BlockFilters {
  alignas(64) A a[kLineTile];
  alignas(64) A inverse_a[kLineTile];
  alignas(64) A rho[kLineTile];
  alignas(64) A inverse_rho[kLineTile];
  alignas(64) A k[kLineTile];
  alignas(64) A bias[kLineTile];

  // Lanes without a filter repeat the last one's values.
  void set(const DepthwiseFilters& f, int64_t first, int64_t count) {
    const auto repeat = [&](const void* from, A* to) {
      if (from == nullptr)
        return;
      const A* v = static_cast<const A*>(from) + first;
      for (int64_t i = 0; i < kLineTile; ++i)
        to[i] = i < Lanes<A>::count ? v[std::min(i, count - 1)] : to[i - Lanes<A>::count];
    };
    repeat(f.a, a);
    repeat(f.inverse_a, inverse_a);
    repeat(f.rho, rho);
    repeat(f.inverse_rho, inverse_rho);
    repeat(f.k, k);
    repeat(f.bias, bias);
  }
};

// Pointers to the parameters of a tile: vectors where lanes are filters, else those of one filter.
template <class A>
struct TileFilters {
  const A *a, *inverse_a, *rho, *inverse_rho, *k, *bias;

  TileFilters(const BlockFilters<A>& b, bool has_bias)
      : a(b.a), inverse_a(b.inverse_a), rho(b.rho), inverse_rho(b.inverse_rho), k(b.k),
        bias(has_bias ? b.bias : nullptr) {}

  TileFilters(const DepthwiseFilters& f, int64_t filter)
      : a(static_cast<const A*>(f.a) + filter),
        inverse_a(static_cast<const A*>(f.inverse_a) + filter),
        rho(static_cast<const A*>(f.rho) + filter),
        inverse_rho(static_cast<const A*>(f.inverse_rho) + filter),
        k(static_cast<const A*>(f.k) + filter),
        bias(f.bias == nullptr ? nullptr : static_cast<const A*>(f.bias) + filter) {}
};

// The weights of a block, [taps, lanes]: of one filter in all lanes, or of a filter per lane.
template <class A>
void block_weights(const DepthwiseShape& s, const void* weight, int64_t first, int64_t filters, A* to) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t taps = s.taps();
  const A* w = static_cast<const A*>(weight) + first * taps;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t lane = 0; lane < lanes; ++lane)
      to[tap * lanes + lane] = !s.channels_last ? w[tap]
                               : lane < filters ? w[lane * taps + tap]
                                                : A(0);
}

// The first `filters` lanes of `count` positions from a map or to it, `pitch` elements apart.
template <class A, class T>
void scatter_lanes(const T* from, int64_t count, int64_t filters, T* to, int64_t pitch) {
  constexpr int64_t lanes = Lanes<A>::count;
  if (filters == lanes) {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * pitch, from + i * lanes, static_cast<std::size_t>(lanes) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t lane = 0; lane < filters; ++lane)
      to[i * pitch + lane] = from[i * lanes + lane];
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
