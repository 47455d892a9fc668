// y, and du with what it adds to sums, of the elements of one vector, by where h comes from:
// made once per position, a function known to the compiler, or one chosen at run time.
//
// An operand is told by its type: Each holds a number per element, Uniform one of all. In channels
// last a vector has V filters and one position, otherwise one filter and V positions.
#pragma once

#include <type_traits>

#include "cuda/support/approximate.cuh"
#include "cuda/support/functions.cuh"

namespace dcconv::cuda {

template <class A, int V>
struct Each {
  A at[V];
  __device__ __forceinline__ A operator[](int j) const { return at[j]; }
};

template <class A>
struct Uniform {
  A value;
  __device__ __forceinline__ A operator[](int) const { return value; }
};

// h of a position, times a with weighting "linear", which then is chosen at run time.
struct PerPosition {};
// Any magnitude and weighting, of position and filter.
struct AnyMagnitude {};

// Runs f(magnitude, angular) if the operator's functions are among those that kernels know when
// they are compiled, the ones that networks are made of; says whether it did. One list for all
// kernels.
template <class F>
bool with_known_functions(const Operator& op, bool per_position, F&& f) {
  const auto by_angular = [&](auto magnitude) {
    if (op.angular == index_in<Cosine>(Angulars{}))
      return f(magnitude, Cosine{}), true;
    if (op.angular == index_in<SquareCosine>(Angulars{}))
      return f(magnitude, SquareCosine{}), true;
    return false;
  };
  if (op.times_a)
    return false;
  if (per_position)
    return by_angular(PerPosition{});
  return op.magnitude == index_in<Tanh>(Magnitudes{}) && by_angular(Tanh{});
}

// Numbers of filters; `bias` is zero where there is none.
template <class N>
struct Filters {
  N inverse_a, rho, inverse_rho, bias;
};

// Numbers of positions for y.
template <class N>
struct OutputPositions {
  N inverse_b;
  N b_or_h;  // h / b for a PerPosition cosine, h for other PerPosition functions, else b
};

// Whether h comes with 1 / b in it, so that a cosine takes one product less.
template <class M, class G>
constexpr bool kWholeScale = std::is_same<M, PerPosition>::value && std::is_same<G, Cosine>::value;

// The operand of one filter.
template <class T, class A>
__device__ __forceinline__ A bias_of(const void* bias, int64_t o) {
  return bias == nullptr ? A(0) : A(load(static_cast<const T*>(bias)[o]));
}

// The operands of V filters from `first` on.
template <class T, class A, int V>
__device__ __forceinline__ void load_filters(
    const FilterOperands& f, const void* bias, int64_t first, Filters<Each<A, V>>& filters
) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t o = first + j;
    const Radius<A> radius = radius_of<A>(f, o);
    filters.inverse_a.at[j] = reciprocal_of(static_cast<const A*>(f.a)[o]);
    filters.rho.at[j] = radius.rho;
    filters.inverse_rho.at[j] = radius.inverse;
    filters.bias.at[j] = bias_of<T, A>(bias, o);
  }
}

// The operands of some filters in shared memory: one access for a warp that has one filter.
template <class A>
class FilterTable {
public:
  static constexpr int kFilters = 512;

  __device__ __forceinline__ explicit FilterTable(SharedMemory& shared)
      : rows_(shared.take<A>(4 * kFilters)) {}

  static SharedBytes& take(SharedBytes& bytes) { return bytes.take<A>(4 * kFilters); }

  // Reads `count` filters from `first` on, once all threads are done with those before.
  template <class T>
  __device__ __forceinline__ void
  fill(const FilterOperands& f, const void* bias, int64_t first, int count) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int64_t o = first + i;
      const Radius<A> radius = radius_of<A>(f, o);
      const A inverse_a = reciprocal_of(static_cast<const A*>(f.a)[o]);
      A* row = rows_ + 4 * i;
      row[0] = inverse_a;
      row[1] = radius.rho;
      row[2] = radius.inverse;
      row[3] = bias_of<T, A>(bias, o);
    }
    __syncthreads();
  }

  __device__ __forceinline__ Filters<Uniform<A>> of(int i) const {
    A row[4];
#pragma unroll
    for (int j = 0; j < 4; j += kWide<A>) {
      const Vector<A, kWide<A>> part = load_vector<A, kWide<A>>(rows_ + 4 * i + j);
#pragma unroll
      for (int k = 0; k < kWide<A>; ++k)
        row[j + k] = part.at[k];
    }
    return {{row[0]}, {row[1]}, {row[2]}, {row[3]}};
  }

private:
  A* rows_;  // [kFilters, 4]: 1 / a, rho, 1 / rho, bias
};

__device__ __forceinline__ bool wants_a(const Operator& op) {
  return op.times_a || op.magnitude >= static_cast<int>(Magnitudes::size);
}

// Elements of a vector that are worked on at a time where functions are chosen at run time: fewer
// temporaries in registers, of which those of the sigmoid are many, and may be those of any.
template <class G, int V>
constexpr bool kManyTemporaries =
    std::is_same<G, Sigmoid>::value || (std::is_same<G, AnyAngular>::value && V == 4);
template <class G, int V>
constexpr int kPart = V < 4                    ? V
                      : kManyTemporaries<G, V> ? 2
                                               : 4;

// Values of filters first, first + step, ..., or `otherwise` where they are not wanted.
template <class A, class E, int P>
__device__ __forceinline__ void
filter_values(const void* values, bool wanted, int64_t first, int step, E otherwise, E (&out)[P]) {
#pragma unroll
  for (int j = 0; j < P; ++j)
    out[j] = wanted ? E(static_cast<const A*>(values)[first + j * step]) : otherwise;
}

// h of elements [from, from + P) whose magnitudes depend on the filter.
template <class E, class R, class B, int P>
__device__ __forceinline__ void filter_magnitudes(
    const Operator& op,
    const Constants<E>& constants,
    const R& rho,
    const R& inverse_rho,
    int from,
    const E (&a)[P],
    const B& b,
    E (&h)[P]
) {
  with_magnitude(op.magnitude, [&](auto type) {
    using Function = decltype(type);
    if constexpr (Function::uses_rho) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const Radius<E> radius{E(rho[from + j]), E(inverse_rho[from + j])};
        h[j] = Function::value(a[j], E(b[from + j]), radius, constants);
      }
    }
  });
}

// y of functions known to the compiler.
template <class M, class G, class E, class F, class N, class A, int V>
__device__ __forceinline__ void output_elements(
    const Constants<E>& constants,
    const Filters<F>& filters,
    const OutputPositions<N>& positions,
    const A (&u)[V],
    A (&y)[V]
) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if constexpr (kWholeScale<M, G>) {
      y[j] = u[j] * filters.inverse_a[j] * positions.b_or_h[j] + filters.bias[j];
    } else {
      const E c(u[j] * (filters.inverse_a[j] * positions.inverse_b[j]));
      E h(positions.b_or_h[j]);
      if constexpr (!std::is_same<M, PerPosition>::value) {
        const Radius<E> radius{E(filters.rho[j]), E(filters.inverse_rho[j])};
        h = M::value(E(1), h, radius, constants);
      }
      y[j] = value_of(h * G::value(c, E(1), constants)) + filters.bias[j];
    }
  }
}

// y of functions chosen at run time, but for an angular one that the compiler may know. step: 0
// where all elements have filter `first`.
template <class G, class E, class F, class N, class A, int V>
__device__ __forceinline__ void chosen_output_elements(
    const Operator& op,
    const FilterOperands& operands,
    bool per_position,
    const Constants<E>& constants,
    const Filters<F>& filters,
    int64_t first,
    int step,
    const OutputPositions<N>& positions,
    const A (&u)[V],
    A (&y)[V]
) {
  constexpr int kP = kPart<G, V>;
#pragma unroll
  for (int from = 0; from < V; from += kP) {
    const int64_t filter = first + from * step;
    E a[kP], h[kP], k[kP], c[kP], g[kP];
    filter_values<A>(operands.a, wants_a(op), filter, step, E(1), a);
    if (per_position) {
#pragma unroll
      for (int j = 0; j < kP; ++j)
        h[j] = E(positions.b_or_h[from + j]);
    } else {
      filter_magnitudes(
          op, constants, filters.rho, filters.inverse_rho, from, a, positions.b_or_h, h
      );
    }
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      const int i = from + j;
      k[j] = kUsesK<G> ? E(curvature_of<A>(operands, filter + j * step)) : E(1);
      c[j] = E(u[i] * (filters.inverse_a[i] * positions.inverse_b[i]));
      h[j] = op.times_a ? h[j] * a[j] : h[j];
    }
    angular_values<G>(op, constants, c, k, g);
#pragma unroll
    for (int j = 0; j < kP; ++j)
      y[from + j] = value_of(h[j] * g[j]) + filters.bias[from + j];
  }
}

}  // namespace dcconv::cuda
