// The filter side: norms, scaled filters, and the gradient of the filters. Weights are [o, size]
// with the elements of a filter in any one order.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// a = sqrt(||w||^2 + eps) and, where wanted, weight * scale or weight * scale / a in library dtype.
template <class T, class U, class A>
void filter_norm(const FilterParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  A* a = static_cast<A*>(p.a);
  for (int64_t o = begin; o < end; ++o) {
    const T* w = weight + o * p.size;
    const A sum = lane_sum<A>(p.size, [=](int64_t i) { return A(load(w[i])) * A(load(w[i])); });
    a[o] = sqrt_of(sum + A(p.eps));
    if (p.scaled == nullptr)
      continue;
    const A factor = static_cast<const A*>(p.scale)[o] / (p.project ? a[o] : A(1));
    U* out = static_cast<U*>(p.scaled) + o * p.size;
#pragma omp simd
    for (int64_t i = 0; i < p.size; ++i)
      out[i] = Store<U>::from(load(w[i]) * factor);
  }
}

// dw = f (G - <G, w> / a^2 w) + extra / a w, with f = grad_scale and G = grad_folded; the
// projection term only with `project`.
template <class T, class A>
void filter_grad(const FilterParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  const A* a = static_cast<const A*>(p.a);
  const A* folded = static_cast<const A*>(p.grad_folded);
  for (int64_t o = begin; o < end; ++o) {
    const T* w = weight + o * p.size;
    const A* g = folded + o * p.size;
    const A scale = p.grad_scale == nullptr ? A(1) : static_cast<const A*>(p.grad_scale)[o];
    A along = 0;
    if (p.project) {
      const A sum = lane_sum<A>(p.size, [=](int64_t i) { return g[i] * A(load(w[i])); });
      along = -scale * sum / (a[o] * a[o]);
    }
    if (p.extra != nullptr)
      along += static_cast<const A*>(p.extra)[o] / a[o];
    T* out = static_cast<T*>(p.grad_weight) + o * p.size;
#pragma omp simd
    for (int64_t i = 0; i < p.size; ++i)
      out[i] = Store<T>::from(g[i] * scale + load(w[i]) * along);
  }
}

template <class U, class A>
void accumulate(const void* from, void* to, int64_t begin, int64_t end) {
  const U* v = static_cast<const U*>(from);
  A* sum = static_cast<A*>(to);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i)
    sum[i] += load(v[i]);
}

template <class U, class T>
void round_to(const void* from, void* to, int64_t begin, int64_t end) {
  const U* v = static_cast<const U*>(from);
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i)
    out[i] = Store<T>::from(load(v[i]));
}

}  // namespace dcconv::cpu::DCCONV_ISA
