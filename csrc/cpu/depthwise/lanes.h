// Where lanes are filters: elementwise functions over positions of one block, [positions, lanes],
// with one set of parameters per lane; rows of x as blocks.
#pragma once

#include "cpu/depthwise/band.h"
#include "cpu/kernels/rows.h"

namespace dcconv::cpu::DCCONV_ISA {

// The parameters of a block.
template <class A>
struct BlockFilters {
  const A *a, *inverse_a, *rho, *inverse_rho, *k, *bias;

  BlockFilters() = default;

  BlockFilters(const DepthwiseFilters& f, int64_t block) {
    const auto of = [&](const void* p) {
      return static_cast<const A*>(p) + block * Lanes<A>::count;
    };
    a = of(f.a);
    inverse_a = of(f.inverse_a);
    rho = of(f.rho);
    inverse_rho = of(f.inverse_rho);
    k = of(f.k);
    bias = f.bias == nullptr ? nullptr : of(f.bias);
  }
};

template <class A>
struct LaneMagnitude {
  int64_t count;  // positions
  BlockFilters<A> filters;
  Constants<A> constants;
  const A* b;
  A* h;
};

template <class M, bool kTimesA, class A>
void magnitude_lanes(const LaneMagnitude<A>& p) {
  constexpr int64_t lanes = Lanes<A>::count;
  const BlockFilters<A> f = p.filters;
  const Constants<A> k = p.constants;
  for (int64_t i = 0; i < p.count; ++i) {
    const A* b = p.b + i * lanes;
    A* h = p.h + i * lanes;
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A v = M::value(f.a[j], b[j], Radius<A>{f.rho[j], f.inverse_rho[j]}, k);
      h[j] = kTimesA ? v * f.a[j] : v;
    }
  }
}

template <class T, class A>
struct LaneAngular {
  int64_t count;
  BlockFilters<A> filters;
  Constants<A> constants;
  const A* u;
  const A* inverse_b;
  const A* h;
  int64_t used;   // lanes
  int64_t pitch;  // elements from one position to the next
  T* y;
};

template <class G, bool kBias, class T, class A>
void angular_lanes(const LaneAngular<T, A>& p) {
  constexpr int64_t lanes = Lanes<A>::count;
  const BlockFilters<A> f = p.filters;
  const Constants<A> s = p.constants;
  for (int64_t i = 0; i < p.count; ++i) {
    const A *u = p.u + i * lanes, *inverse_b = p.inverse_b + i * lanes, *h = p.h + i * lanes;
    alignas(64) T y[lanes];
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A v = h[j] * G::value(u[j] * (f.inverse_a[j] * inverse_b[j]), f.k[j], s);
      y[j] = Store<T>::from(kBias ? v + f.bias[j] : v);
    }
    store_lanes<A>(y, p.used, p.y + i * p.pitch);
  }
}

template <class A>
using MagnitudeLanes = void (*)(const LaneMagnitude<A>&);

template <class A, class... M, class... W>
MagnitudeLanes<A> pick_magnitude_lanes(TypeList<M...>, TypeList<W...>, const Operator& op) {
  static constexpr MagnitudeLanes<A> plain[] = {
      magnitude_lanes<M, false, A>..., magnitude_lanes<W, false, A>...
  };
  static constexpr MagnitudeLanes<A> times_a[] = {
      magnitude_lanes<M, true, A>..., magnitude_lanes<W, true, A>...
  };
  return (op.times_a ? times_a : plain)[op.magnitude];
}

template <class T, class A>
using AngularLanes = void (*)(const LaneAngular<T, A>&);

template <class T, class A, class... G>
AngularLanes<T, A> pick_angular_lanes(TypeList<G...>, int index, bool bias) {
  static constexpr AngularLanes<T, A> plain[] = {angular_lanes<G, false, T, A>...};
  static constexpr AngularLanes<T, A> with_bias[] = {angular_lanes<G, true, T, A>...};
  return (bias ? with_bias : plain)[index];
}

}  // namespace dcconv::cpu::DCCONV_ISA
