// du of the elements of one vector, what they add to the row scalar t, and to the sums over
// positions that parameters need.
#pragma once

#include <limits>

#include "cuda/passes/elements.cuh"

namespace dcconv::cuda {

// What the kernels are instantiated for: no column sums, the radius alone, any.
constexpr int kAllSums = kSumRho | kSumA | kSumK | kSumBias;

// Numbers of positions for du.
//
// PerPosition functions:  1 / h with y kept, 1 / b with u;  h / b;  (d + h e / g) / b^2;  dh/drho.
// Known functions:        1 / b;  b;  alpha / b;  1 / b^2 with y kept, alpha / b^2 with u.
// Chosen at run time:     1 / b;  b or, per position, h;  d per position;  dh/drho per position.
//
// Known functions are alpha times one of b / rho. With y kept, alpha g stands for g, and the
// derivatives of t and of the radius need no alpha; dg/dc then has the root of alpha in it if g is
// a square, and the root of alpha over b stands for alpha / b.
template <class N>
struct GradPositions {
  N inverse_b, b_or_h, d, h_rho;
};

// Column sums: one per element where each has its own filter (N = V), or one of all (N = 1).
template <class A, int N>
struct SumValues {
  A rho[N];
  A a[N];
  A k[N];
  A bias[N];
};

// e = g - c dg/dc of the functions that the compiler may know is a multiple of g.
template <class G>
constexpr int kEOverG = 0;
template <>
constexpr int kEOverG<SquareCosine> = -1;

// g and dg/dc, from g (y / h) or from c.
template <class E>
struct AngularSlope {
  E g, g_c;
};

template <class G, class E>
__device__ __forceinline__ AngularSlope<E> slope_of_g(E g) {
  if constexpr (std::is_same<G, Cosine>::value)
    return {g, E(1)};
  else
    return {g, E(2) * sqrt_of(abs_of(g))};
}

template <class G, class E>
__device__ __forceinline__ AngularSlope<E> slope_of_c(E c) {
  if constexpr (std::is_same<G, Cosine>::value)
    return {c, E(1)};
  else
    return {c * abs_of(c), E(2) * abs_of(c)};
}

// y / h for h >= 0. Where h has no exponent left y has none either, and any divisor gives g = 0.
template <class E>
__device__ __forceinline__ E divide_by_h(E y, E h) {
  using A = NumberOf<E>;
  const A divisor = ::fmax(value_of(h), std::numeric_limits<A>::min());
  return quotient_of(y, E(divisor));
}

// du, the terms dy (d g + h e) of t, over b^2 for PerPosition functions and over h_rho of the
// position for others, and additions to the sums of the radius, for functions known to the
// compiler; those of the others have to be multiplied by radius_factor. kKept: what backward kept.
template <class M, class G, Kept kKept, int kSums, class E, class F, class P, class A, int V, int N>
__device__ __forceinline__ void grad_elements(
    const Filters<F>& filters,
    const GradPositions<P>& positions,
    const A (&dy)[V],
    const A (&kept)[V],
    A (&du)[V],
    A (&term)[V],
    SumValues<A, N>& sums
) {
  const Constants<E> unit{E(1), E(0), E(1), E(0)};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A inverse_a = filters.inverse_a[j], inverse_b = positions.inverse_b[j];
    const E of_y(dy[j]);
    AngularSlope<E> s;
    E d, h_rho, scale;  // scale: h / (a b)
    if constexpr (std::is_same<M, PerPosition>::value) {
      s = kKept == Kept::output ? slope_of_g<G>(E(kept[j] * inverse_b))
                                : slope_of_c<G>(E(kept[j] * (inverse_a * inverse_b)));
      scale = E(positions.b_or_h[j] * inverse_a);
      d = E(positions.d[j]);
      h_rho = E(positions.h_rho[j]);
    } else {
      // The derivative by 1 / rho takes a product less than that by rho.
      const E b(positions.b_or_h[j]), z = b * E(filters.inverse_rho[j]);
      const MagnitudeGrad<E> m = M::grad(E(1), z, Radius<E>{E(1), E(1)}, unit);
      s = kKept == Kept::output ? slope_of_g<G>(divide_by_h(E(kept[j]), m.h))
                                : slope_of_c<G>(E(kept[j] * (inverse_a * inverse_b)));
      scale = m.h * E(inverse_a * positions.d[j]);
      d = kEOverG<G> == 0 ? m.d : m.d + E(kEOverG<G>) * m.h;
      h_rho = m.h_rho;
    }
    const E along = of_y * s.g;
    du[j] = value_of(std::is_same<G, Cosine>::value ? of_y * scale : of_y * scale * s.g_c);
    term[j] = value_of(along * d);
    if constexpr ((kSums & kSumRho) != 0)
      sums.rho[j % N] += value_of(along * h_rho);
  }
}

// What is missing in a known function's sums of the radius.
template <class M, Kept kKept, class A>
__device__ __forceinline__ A radius_factor(A alpha, A inverse_rho) {
  if constexpr (std::is_same<M, PerPosition>::value || std::is_same<M, AnyMagnitude>::value)
    return A(1);
  else
    return kKept == Kept::output ? inverse_rho : alpha * inverse_rho;
}

// The same for functions chosen at run time, but for an angular one that the compiler may know, and
// for all sums. step: 0 where all elements have filter `first`.
template <class G, class E, class F, class P, class A, int V, int N>
__device__ __forceinline__ void chosen_grad_elements(
    const GradDotParams& p,
    bool per_position,
    const Constants<E>& constants,
    const Filters<F>& filters,
    int64_t first,
    int step,
    const GradPositions<P>& positions,
    const A (&grad_y)[V],
    const A (&kept)[V],
    A (&du)[V],
    A (&term)[V],
    SumValues<A, N>& sums
) {
  constexpr int kP = kPart<G, V>;
#pragma unroll
  for (int from = 0; from < V; from += kP) {
    const int64_t filter = first + from * step;
    E a[kP], k[kP], y[kP], c[kP], h[kP], scale[kP];
    MagnitudeGrad<E> m[kP];
    AngularGrad<E> g[kP];
    filter_values<A>(p.filters.a, wants_a(p.op), filter, step, E(1), a);
    if (per_position) {
#pragma unroll
      for (int j = 0; j < kP; ++j) {
        const int i = from + j;
        m[j] = {E(positions.b_or_h[i]), E(positions.d[i]), E(positions.h_rho[i]), E(0)};
      }
    } else {
      with_magnitude(p.op.magnitude, [&](auto type) {
        using Function = decltype(type);
        if constexpr (Function::uses_rho) {
#pragma unroll
          for (int j = 0; j < kP; ++j) {
            const Radius<E> radius{E(filters.rho[from + j]), E(filters.inverse_rho[from + j])};
            m[j] = Function::grad(a[j], E(positions.b_or_h[from + j]), radius, constants);
          }
        }
      });
    }
    if (p.op.times_a) {
#pragma unroll
      for (int j = 0; j < kP; ++j)
        m[j] = {m[j].h * a[j], m[j].d * a[j], m[j].h_rho * a[j], m[j].h};
    }
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      const int i = from + j;
      k[j] = kUsesK<G> ? E(curvature_of<A>(p.filters, filter + j * step)) : E(1);
      scale[j] = E(filters.inverse_a[i] * positions.inverse_b[i]);
      y[j] = E(kept[i]);
      h[j] = m[j].h;
    }
    cosines_of<G>(p.op, p.kept_is, y, h, scale, c);
    angular_grads<G>(p.op, constants, c, k, g);
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      const int i = from + j;
      const E dy(grad_y[i]);
      du[i] = value_of(dy * h[j] * g[j].g_c * scale[j]);
      term[i] = value_of(dy * (m[j].d * g[j].g + h[j] * g[j].e));
      sums.rho[i % N] += value_of(dy * g[j].g * m[j].h_rho);
      sums.a[i % N] += value_of(dy * g[j].g * m[j].h_a);
      sums.k[i % N] += value_of(dy * h[j] * g[j].g_k);
      sums.bias[i % N] += grad_y[i];
    }
  }
}

// f(bit, values) for the kinds of kSums.
template <int kSums, class A, int N, class F>
__device__ __forceinline__ void each_sum(const SumValues<A, N>& sums, F&& f) {
  if constexpr ((kSums & kSumRho) != 0)
    f(kSumRho, sums.rho);
  if constexpr ((kSums & kSumA) != 0)
    f(kSumA, sums.a);
  if constexpr ((kSums & kSumK) != 0)
    f(kSumK, sums.k);
  if constexpr ((kSums & kSumBias) != 0)
    f(kSumBias, sums.bias);
}

// Number of wanted kinds before `bit`: its row in parts.
__device__ __forceinline__ int sum_row(int sums, int bit) {
  return sum_kinds(sums & (bit - 1));
}

// The numbers of one position.
template <class M, class G, Kept kKept, class A>
__device__ __forceinline__ void grad_position(
    const GradDotParams& p, bool per_position, const Constants<A>& constants, A b, A (&out)[4]
) {
  const A inverse = reciprocal_of(b);
  out[0] = inverse;
  out[1] = b;
  out[2] = out[3] = A(0);
  if constexpr (!std::is_same<M, PerPosition>::value && !std::is_same<M, AnyMagnitude>::value) {
    const A alpha = constants.alpha;
    const bool root = kKept == Kept::output && !std::is_same<G, Cosine>::value;
    out[2] = (root ? with_sign(sqrt_of(abs_of(alpha)), alpha) : alpha) * inverse;
    out[3] = kKept == Kept::output ? inverse * inverse : alpha * inverse * inverse;
    return;
  }
  if (!std::is_same<M, PerPosition>::value && !per_position)
    return;
  const MagnitudeGrad<A> m =
      position_magnitude_grad(p.op, constants, b, radius_of<A>(p.filters, 0));
  out[1] = m.h;
  out[2] = m.d;
  out[3] = m.h_rho;
  if constexpr (std::is_same<M, PerPosition>::value) {
    out[0] = kKept == Kept::output ? with_sign(divide_by_h(A(1), abs_of(m.h)), m.h) : inverse;
    out[1] = m.h * inverse;
    out[2] = (m.d + A(kEOverG<G>) * m.h) * inverse * inverse;
  }
}

}  // namespace dcconv::cuda
