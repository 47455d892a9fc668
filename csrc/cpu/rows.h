// Elementwise functions over one tile: magnitude, angle and their derivatives, one instantiation
// per function, chosen by index. A tile holds up to kTile elements; its operands lie in the
// first-level cache, so splitting magnitude and angle costs little and keeps the code linear in
// the number of functions.
#pragma once

#include "cpu/kernels.h"
#include "functions.h"
#include "storage.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// A per-filter operand: a vector along the tile (channels last) or one value for it (planar).
template <class A, bool kVector>
struct Operand {
  const A* p;
  DC_HD A operator[](int64_t i) const { return kVector ? p[i] : p[0]; }
};

template <class A>
struct MagnitudeRow {
  int64_t count;
  const A* a;
  const A* b;
  const A* rho;
  const A* inverse_rho;
  Constants<A> constants;
  bool times_a;
  A* h;
  A* d;
  A* h_rho;  // null unless wanted
  A* h_a;    // null unless wanted
};

template <class M, class A, bool kVector>
void magnitude_value(const MagnitudeRow<A>& row) {
  const Operand<A, kVector> a{row.a}, rho{row.rho}, inverse{row.inverse_rho};
  const Constants<A> k = row.constants;
  const A* b = row.b;
  A* h = row.h;
  if (row.times_a) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i)
      h[i] = M::value(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k) * a[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i)
      h[i] = M::value(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k);
  }
}

template <class M, class A, bool kVector>
void magnitude_grad(const MagnitudeRow<A>& row) {
  const Operand<A, kVector> a{row.a}, rho{row.rho}, inverse{row.inverse_rho};
  const Constants<A> k = row.constants;
  const A* b = row.b;
  A *h = row.h, *d = row.d, *h_rho = row.h_rho, *h_a = row.h_a;
  if (h_a == nullptr && h_rho == nullptr && !row.times_a) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const MagnitudeGrad<A> m = M::grad(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k);
      h[i] = m.h;
      d[i] = m.d;
    }
    return;
  }
  if (h_a == nullptr && !row.times_a) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const MagnitudeGrad<A> m = M::grad(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k);
      h[i] = m.h;
      d[i] = m.d;
      h_rho[i] = m.h_rho;
    }
    return;
  }
  for (int64_t i = 0; i < row.count; ++i) {
    const MagnitudeGrad<A> m = M::grad(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k);
    const A factor = row.times_a ? a[i] : A(1);
    h[i] = m.h * factor;
    d[i] = m.d * factor;
    if (h_rho != nullptr) h_rho[i] = m.h_rho * factor;
    if (h_a != nullptr) h_a[i] = row.times_a ? m.h : m.h_a;
  }
}

template <class T, class U, class A>
struct AngularRow {
  int64_t count;
  const U* u;
  const A* inverse_a;
  const A* inverse_b;
  const A* h;
  const A* k;
  const A* bias;  // null without
  Constants<A> constants;
  T* y;
};

template <class G, class T, class U, class A, bool kVector>
void angular_value(const AngularRow<T, U, A>& row) {
  const Operand<A, kVector> inverse_a{row.inverse_a}, k{row.k}, bias{row.bias};
  const Constants<A> s = row.constants;
  const A *inverse_b = row.inverse_b, *h = row.h;
  const U* u = row.u;
  T* y = row.y;
  if (row.bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const A c = load(u[i]) * (inverse_a[i] * inverse_b[i]);
      y[i] = Store<T>::from(h[i] * G::value(c, k[i], s) + bias[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const A c = load(u[i]) * (inverse_a[i] * inverse_b[i]);
      y[i] = Store<T>::from(h[i] * G::value(c, k[i], s));
    }
  }
}

template <class T, class U, class A>
struct GradRow {
  int64_t count;
  const T* grad_y;
  const T* kept;
  const A* inverse_a;
  const A* inverse_b;
  const A* h;
  const A* d;
  const A* k;
  Constants<A> constants;
  U* grad_u;
  A* t;     // channels last: dy (d g + h e) per element; planar: added to
  A* dy_g;  // null unless wanted
  A* dy_k;  // dy h g_k, null unless wanted
};

template <class G, class T, class U, class A, bool kVector, Kept kKept>
void angular_grad(const GradRow<T, U, A>& row) {
  const Operand<A, kVector> inverse_a{row.inverse_a}, k{row.k};
  const Constants<A> s = row.constants;
  const A *inverse_b = row.inverse_b, *h = row.h, *d = row.d;
  const T *grad_y = row.grad_y, *kept = row.kept;
  U* grad_u = row.grad_u;
  A *t = row.t, *dy_g = row.dy_g, *dy_k = row.dy_k;
  const auto cosine = [&](int64_t i, A scale) -> A {
    if constexpr (kKept == Kept::output) {
      // h = 0 only where it underflowed, and y with it.
      const A g = h[i] == A(0) ? A(0) : load(kept[i]) / h[i];
      return G::inverse(g);
    } else {
      return load(kept[i]) * scale;
    }
  };
  const auto row_term = [&](int64_t i, A dy, const AngularGrad<A>& m) -> A {
    if constexpr (G::has_e) {
      return dy * (d[i] * m.g + h[i] * m.e);
    } else {
      return dy * d[i] * m.g;
    }
  };
  if (dy_g == nullptr && dy_k == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const A scale = inverse_a[i] * inverse_b[i];
      const AngularGrad<A> m = G::grad(cosine(i, scale), k[i], s);
      const A dy = load(grad_y[i]);
      grad_u[i] = Store<U>::from(dy * h[i] * m.g_c * scale);
      const A term = row_term(i, dy, m);
      t[i] = kVector ? term : t[i] + term;
    }
    return;
  }
  if (dy_k == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const A scale = inverse_a[i] * inverse_b[i];
      const AngularGrad<A> m = G::grad(cosine(i, scale), k[i], s);
      const A dy = load(grad_y[i]);
      grad_u[i] = Store<U>::from(dy * h[i] * m.g_c * scale);
      const A term = row_term(i, dy, m);
      t[i] = kVector ? term : t[i] + term;
      dy_g[i] = dy * m.g;
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const A scale = inverse_a[i] * inverse_b[i];
    const AngularGrad<A> m = G::grad(cosine(i, scale), k[i], s);
    const A dy = load(grad_y[i]);
    grad_u[i] = Store<U>::from(dy * h[i] * m.g_c * scale);
    const A term = row_term(i, dy, m);
    t[i] = kVector ? term : t[i] + term;
    dy_g[i] = dy * m.g;
    dy_k[i] = dy * h[i] * m.g_k;
  }
}

// Function pointers by index, from the type lists.
template <class A>
using MagnitudeFunction = void (*)(const MagnitudeRow<A>&);

template <class A, bool kVector, class... M, class... W>
MagnitudeFunction<A> pick_magnitude_value(TypeList<M...>, TypeList<W...>, int index) {
  static constexpr MagnitudeFunction<A> table[] = {
      magnitude_value<M, A, kVector>..., magnitude_value<W, A, kVector>...};
  return table[index];
}

template <class A, bool kVector, class... M, class... W>
MagnitudeFunction<A> pick_magnitude_grad(TypeList<M...>, TypeList<W...>, int index) {
  static constexpr MagnitudeFunction<A> table[] = {
      magnitude_grad<M, A, kVector>..., magnitude_grad<W, A, kVector>...};
  return table[index];
}

template <class T, class U, class A>
using AngularFunction = void (*)(const AngularRow<T, U, A>&);

template <class T, class U, class A, bool kVector, class... G>
AngularFunction<T, U, A> pick_angular_value(TypeList<G...>, int index) {
  static constexpr AngularFunction<T, U, A> table[] = {angular_value<G, T, U, A, kVector>...};
  return table[index];
}

template <class T, class U, class A>
using GradFunction = void (*)(const GradRow<T, U, A>&);

template <class T, class U, class A, bool kVector, class... G>
GradFunction<T, U, A> pick_angular_grad(TypeList<G...>, int index, Kept kept) {
  static constexpr GradFunction<T, U, A> from_output[] = {
      angular_grad<G, T, U, A, kVector, Kept::output>...};
  static constexpr GradFunction<T, U, A> from_dot[] = {
      angular_grad<G, T, U, A, kVector, Kept::dot>...};
  return kept == Kept::output ? from_output[index] : from_dot[index];
}

template <class A>
Constants<A> constants_of(const Operator& op) {
  return {A(op.alpha), A(op.beta), A(op.power), A(op.delta)};
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
