// Elementwise functions over one tile: magnitude, angle and their derivatives, one instantiation
// per function, chosen by index. A tile holds up to kTile elements; its operands lie in the
// first-level cache, so splitting magnitude and angle costs little and keeps the code linear in
// the number of functions.
#pragma once

#include "cpu/kernels/kernels.h"
#include "functions.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

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
  bool parameters;  // whether h_rho and h_a are wanted
  A* h_rho;
  A* h_a;
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

// With h_rho and h_a. Template switches: a loop-invariant bool would keep the loop scalar.
template <class M, class A, bool kVector, bool kTimesA>
void magnitude_grad_parameters(const MagnitudeRow<A>& row) {
  const Operand<A, kVector> a{row.a}, rho{row.rho}, inverse{row.inverse_rho};
  const Constants<A> k = row.constants;
  const A* b = row.b;
  A *h = row.h, *d = row.d, *h_rho = row.h_rho, *h_a = row.h_a;
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const A a_i = a[i];
    const MagnitudeGrad<A> m = M::grad(a_i, b[i], Radius<A>{rho[i], inverse[i]}, k);
    if constexpr (kTimesA) {
      h[i] = m.h * a_i;
      d[i] = m.d * a_i;
      h_rho[i] = m.h_rho * a_i;
      h_a[i] = m.h;
    } else {
      h[i] = m.h;
      d[i] = m.d;
      h_rho[i] = m.h_rho;
      h_a[i] = m.h_a;
    }
  }
}

template <class M, class A, bool kVector>
void magnitude_grad(const MagnitudeRow<A>& row) {
  if (row.times_a) {
    magnitude_grad_parameters<M, A, kVector, true>(row);
    return;
  }
  if (row.parameters) {
    magnitude_grad_parameters<M, A, kVector, false>(row);
    return;
  }
  const Operand<A, kVector> a{row.a}, rho{row.rho}, inverse{row.inverse_rho};
  const Constants<A> k = row.constants;
  const A* b = row.b;
  A *h = row.h, *d = row.d;
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const MagnitudeGrad<A> m = M::grad(a[i], b[i], Radius<A>{rho[i], inverse[i]}, k);
    h[i] = m.h;
    d[i] = m.d;
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

// c from y (and h) or from u. Values come loaded: a load inside a branch would not vectorise.
template <class G, Kept kKept, class A>
DC_HD A cosine_of(A kept, A h, A scale) {
  if constexpr (kKept == Kept::output) {
    // h = 0 only where it underflowed, and y with it: any divisor gives g = 0.
    return G::inverse(kept / (h == A(0) ? A(1) : h));
  } else {
    return kept * scale;
  }
}

// Functions that do not give c from y have backward read u whatever is asked for: no kernel reads
// their y.
template <class G, Kept kKept>
constexpr Kept kept_of = G::invertible ? kKept : Kept::dot;

// dy (d g + h e)
template <class G, class A>
DC_HD A norm_term(A dy, A h, A d, A g, A e) {
  if constexpr (G::has_e) {
    return dy * (d * g + h * e);
  } else {
    return dy * d * g;
  }
}

// kSums: 0 no column sums, 1 dy g, 2 dy g and dy h g_k.
template <class G, class T, class U, class A, bool kVector, Kept kKept, int kSums>
void angular_grad_sums(const GradRow<T, U, A>& row) {
  const Operand<A, kVector> inverse_a{row.inverse_a}, k{row.k};
  const Constants<A> s = row.constants;
  const A *inverse_b = row.inverse_b, *h = row.h, *d = row.d;
  const T *grad_y = row.grad_y, *kept = row.kept;
  U* grad_u = row.grad_u;
  A *t = row.t, *dy_g = row.dy_g, *dy_k = row.dy_k;
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const A scale = inverse_a[i] * inverse_b[i];
    const A dy = load(grad_y[i]), h_i = h[i], d_i = d[i];
    const AngularGrad<A> m = G::grad(cosine_of<G, kKept>(A(load(kept[i])), h_i, scale), k[i], s);
    grad_u[i] = Store<U>::from(dy * h_i * m.g_c * scale);
    const A term = norm_term<G>(dy, h_i, d_i, m.g, m.e);
    t[i] = kVector ? term : t[i] + term;
    if constexpr (kSums >= 1)
      dy_g[i] = dy * m.g;
    if constexpr (kSums >= 2)
      dy_k[i] = dy * h_i * m.g_k;
  }
}

template <class G, class T, class U, class A, bool kVector, Kept kKept>
void angular_grad(const GradRow<T, U, A>& row) {
  if (row.dy_k != nullptr) {
    angular_grad_sums<G, T, U, A, kVector, kKept, 2>(row);
  } else if (row.dy_g != nullptr) {
    angular_grad_sums<G, T, U, A, kVector, kKept, 1>(row);
  } else {
    angular_grad_sums<G, T, U, A, kVector, kKept, 0>(row);
  }
}

// Function pointers by index, from the type lists.
template <class A>
using MagnitudeFunction = void (*)(const MagnitudeRow<A>&);

template <class A, bool kVector, class... M, class... W>
MagnitudeFunction<A> pick_magnitude_value(TypeList<M...>, TypeList<W...>, int index) {
  static constexpr MagnitudeFunction<A> table[] = {
      magnitude_value<M, A, kVector>..., magnitude_value<W, A, kVector>...
  };
  return table[index];
}

template <class A, bool kVector, class... M, class... W>
MagnitudeFunction<A> pick_magnitude_grad(TypeList<M...>, TypeList<W...>, int index) {
  static constexpr MagnitudeFunction<A> table[] = {
      magnitude_grad<M, A, kVector>..., magnitude_grad<W, A, kVector>...
  };
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
      angular_grad<G, T, U, A, kVector, kept_of<G, Kept::output>>...
  };
  static constexpr GradFunction<T, U, A> from_dot[] = {
      angular_grad<G, T, U, A, kVector, Kept::dot>...
  };
  return kept == Kept::output ? from_output[index] : from_dot[index];
}

template <class A>
Constants<A> constants_of(const Operator& op) {
  return {A(op.alpha), A(op.beta), A(op.power), A(op.delta)};
}

}  // namespace dcconv::cpu::DCCONV_ISA
