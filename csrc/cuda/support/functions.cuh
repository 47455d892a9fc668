// Magnitude and angular functions of V elements with the operator chosen at run time: the index is
// the same for all threads, so a choice costs a few instructions per vector.
#pragma once

#include <utility>

#include "cuda/kernels.h"
#include "cuda/support/approximate.cuh"
#include "cuda/support/device.cuh"
#include "functions.h"
#include "storage.h"

namespace dcconv::cuda {

using namespace ::dcconv::portable;

template <class F, class... Types, std::size_t... I>
__device__ __forceinline__ void
with_type(TypeList<Types...>, std::index_sequence<I...>, int index, F&& f) {
  (void)((index == static_cast<int>(I) ? (f(Types{}), true) : false) || ...);
}

// f(the type at `index`)
template <class F, class... Types>
__device__ __forceinline__ void with_type(TypeList<Types...> list, int index, F&& f) {
  with_type(list, std::index_sequence_for<Types...>{}, index, f);
}

// f(magnitude), index in Magnitudes followed by WeightedMagnitudes.
template <class F, class... M, class... W>
__device__ __forceinline__ void with_magnitude(TypeList<M...>, TypeList<W...>, int index, F&& f) {
  with_type(TypeList<M..., W...>{}, index, f);
}
template <class F>
__device__ __forceinline__ void with_magnitude(int index, F&& f) {
  with_magnitude(Magnitudes{}, WeightedMagnitudes{}, index, f);
}

// The index of a type.
template <class F, class... Types>
constexpr int index_in(TypeList<Types...>) {
  int index = 0, found = -1;
  ((found = std::is_same<F, Types>::value ? index : found, ++index), ...);
  return found;
}

template <class A>
__device__ __forceinline__ Constants<A> constants_of(const Operator& op) {
  return {A(op.alpha), A(op.beta), A(op.power), A(op.delta)};
}

// Angular function chosen at run time, with the interface of those in functions.h: for kernels
// that are not worth an instantiation per function.
struct AnyAngular {};

template <class G>
constexpr bool kUsesK = G::uses_k;
template <>
constexpr bool kUsesK<AnyAngular> = true;

// g of V cosines
template <class G, class A, int V>
__device__ __forceinline__ void angular_values(
    const Operator& op, const Constants<A>& constants, const A (&c)[V], const A (&k)[V], A (&g)[V]
) {
  const auto evaluate = [&](auto type) {
    using Function = decltype(type);
#pragma unroll
    for (int j = 0; j < V; ++j)
      g[j] = Function::value(c[j], k[j], constants);
  };
  if constexpr (std::is_same<G, AnyAngular>::value) {
    with_type(Angulars{}, op.angular, evaluate);
  } else {
    evaluate(G{});
  }
}

// c of V elements from kept y and h, or from kept u and 1 / (a b).
template <class G, class A, int V>
__device__ __forceinline__ void cosines_of(
    const Operator& op,
    Kept kept_is,
    const A (&kept)[V],
    const A (&h)[V],
    const A (&scale)[V],
    A (&c)[V]
) {
  if (kept_is == Kept::dot) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      c[j] = kept[j] * scale[j];
    return;
  }
  const auto invert = [&](auto type) {
    using Function = decltype(type);
    if constexpr (Function::invertible) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        // h = 0 only where it underflowed, and y with it: any divisor gives g = 0.
        c[j] = Function::inverse(kept[j] / (h[j] == A(0) ? A(1) : h[j]));
    }
  };
  if constexpr (std::is_same<G, AnyAngular>::value) {
    with_type(Angulars{}, op.angular, invert);
  } else {
    invert(G{});
  }
}

template <class G, class A, int V>
__device__ __forceinline__ void angular_grads(
    const Operator& op,
    const Constants<A>& constants,
    const A (&c)[V],
    const A (&k)[V],
    AngularGrad<A> (&g)[V]
) {
  const auto evaluate = [&](auto type) {
    using Function = decltype(type);
#pragma unroll
    for (int j = 0; j < V; ++j)
      g[j] = Function::grad(c[j], k[j], constants);
  };
  if constexpr (std::is_same<G, AnyAngular>::value) {
    with_type(Angulars{}, op.angular, evaluate);
  } else {
    evaluate(G{});
  }
}

// rho = max(radius * mean, floor) of filter o; radius and mean count as 1 where absent.
template <class A>
__device__ __forceinline__ Radius<A> radius_of(const FilterOperands& f, int64_t o) {
  const A r = f.radius == nullptr ? A(1) : static_cast<const A*>(f.radius)[o * f.radius_stride];
  const A product = f.mean == nullptr ? r : r * *static_cast<const A*>(f.mean);
  const A rho = at_least(product, A(kRhoFloor));
  return {rho, reciprocal_of(rho)};
}

template <class A>
__device__ __forceinline__ A curvature_of(const FilterOperands& f, int64_t o) {
  return f.k == nullptr ? A(1) : static_cast<const A*>(f.k)[o * f.k_stride];
}

// Whether h depends on the position alone, up to a factor a: no weighting inside of it, no radius
// per filter.
template <class... M>
__host__ __device__ __forceinline__ bool
h_per_position(TypeList<M...>, const Operator& op, const FilterOperands& f) {
  bool uses_rho = false;
  int index = 0;
  ((uses_rho = uses_rho || (index++ == op.magnitude && M::uses_rho)), ...);
  return op.magnitude < static_cast<int>(sizeof...(M)) &&
         (!uses_rho || f.radius == nullptr || f.radius_stride == 0);
}

// h of one element of a magnitude that depends on the position alone.
template <class A>
__device__ __forceinline__ A
position_magnitude(const Operator& op, const Constants<A>& constants, A b, Radius<A> radius) {
  A h(0);
  with_type(Magnitudes{}, op.magnitude, [&](auto type) {
    h = decltype(type)::value(A(1), b, radius, constants);
  });
  return h;
}

template <class A>
__device__ __forceinline__ MagnitudeGrad<A>
position_magnitude_grad(const Operator& op, const Constants<A>& constants, A b, Radius<A> radius) {
  MagnitudeGrad<A> m{};
  with_type(Magnitudes{}, op.magnitude, [&](auto type) {
    m = decltype(type)::grad(A(1), b, radius, constants);
  });
  return m;
}

}  // namespace dcconv::cuda
