// dy and (y or u) -> du = dy h g_c / (a b), the row scalar t = sum_o dy (d g + h e) / b^2 of the
// patch-norm gradient, and the column sums that parameters need. Sums over filters and positions
// have a fixed order; partial column sums are kept per task.
#pragma once

#include <algorithm>

#include "cpu/kernels/epilogue.h"

namespace dcconv::cpu::DCCONV_ISA {

template <class A>
struct GradTile {
  alignas(64) A b[kTile];
  alignas(64) A inverse_b[kTile];
  alignas(64) A h[kTile];
  alignas(64) A d[kTile];
  alignas(64) A h_rho[kTile];
  alignas(64) A h_a[kTile];
  alignas(64) A t[kTile];
  alignas(64) A dy_g[kTile];
  alignas(64) A dy_k[kTile];
};

template <class A>
A* task_sums(void* sums, int64_t task, int64_t o) {
  return sums == nullptr ? nullptr : static_cast<A*>(sums) + task * o;
}

template <class T, class U, class A>
void grad_dot_channels_last(const GradDotParams& p, int64_t begin, int64_t end) {
  const Positions& shape = p.shape;
  const auto magnitude_rows =
      pick_magnitude_grad<A, false>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto magnitude =
      pick_magnitude_grad<A, true>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto angular = pick_angular_grad<T, U, A, true>(Angulars{}, p.op.angular, p.kept_is);
  GradTile<A> buffer;
  // Per position: 1/b, h, d, h_rho, sums of t.
  alignas(64) A row_inverse[kTile], row_h[kTile], row_d[kTile], row_rho[kTile], row_a[kTile],
      row_t[kTile];
  const bool rho = p.sums.rho != nullptr, a = p.sums.a != nullptr;
  MagnitudeRow<A> m{};
  m.constants = constants_of<A>(p.op);
  m.times_a = p.op.times_a;
  m.parameters = p.sums.rho != nullptr || p.sums.a != nullptr;
  GradRow<T, U, A> g{};
  g.inverse_b = buffer.inverse_b;
  g.h = buffer.h;
  g.d = buffer.d;
  g.constants = m.constants;
  g.t = buffer.t;
  g.dy_g = rho || a ? buffer.dy_g : nullptr;
  g.dy_k = p.sums.k != nullptr ? buffer.dy_k : nullptr;
  if (g.dy_k != nullptr)
    g.dy_g = buffer.dy_g;
  const int64_t tile_rows = shape.tile_rows();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t last = std::min((task + 1) * shape.task_rows(), shape.n * shape.pixels);
    A* sum_rho = task_sums<A>(p.sums.rho, task, shape.o);
    A* sum_a = task_sums<A>(p.sums.a, task, shape.o);
    A* sum_k = task_sums<A>(p.sums.k, task, shape.o);
    A* sum_bias = task_sums<A>(p.sums.bias, task, shape.o);
    for (A* sums : {sum_rho, sum_a, sum_k, sum_bias})
      if (sums != nullptr)
        std::fill_n(sums, shape.o, A(0));
    for (int64_t row = task * shape.task_rows(); row < last; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, last - row);
      const A* norms = static_cast<const A*>(p.norm) + row * shape.groups;
      A* t = p.t == nullptr ? nullptr : static_cast<A*>(p.t) + row * shape.groups;
      if (t != nullptr)
        std::fill_n(t, rows * shape.groups, A(0));
      for (int64_t from = 0; from < shape.o; from += kTile) {
        const Tile tile(shape, rows, from);
        const A* b = norms + tile.first_group;
#pragma omp simd
        for (int64_t i = 0; i < tile.values(); ++i)
          row_inverse[i] = A(1) / b[i];
        tile.spread(row_inverse, buffer.inverse_b);
        m.a = vector_of<A>(p.filters.a, from);
        m.rho = vector_of<A>(p.filters.rho, from);
        m.inverse_rho = vector_of<A>(p.filters.inverse_rho, from);
        if (shape.h_per_position) {
          m.count = tile.values();
          m.b = b;
          m.h = row_h;
          m.d = row_d;
          m.h_rho = row_rho;
          m.h_a = row_a;
          magnitude_rows(m);
          tile.spread(row_h, buffer.h);
          tile.spread(row_d, buffer.d);
          if (rho)
            tile.spread(row_rho, buffer.h_rho);
        } else {
          tile.spread(b, buffer.b);
          m.count = tile.count();
          m.b = buffer.b;
          m.h = buffer.h;
          m.d = buffer.d;
          m.h_rho = buffer.h_rho;
          m.h_a = buffer.h_a;
          magnitude(m);
        }
        const int64_t offset = row * shape.o + from;
        g.count = tile.count();
        g.grad_y = static_cast<const T*>(p.grad_y) + offset;
        g.kept = static_cast<const T*>(p.kept) + offset;
        g.inverse_a = vector_of<A>(p.filters.inverse_a, from);
        g.k = vector_of<A>(p.filters.k, from);
        g.grad_u = static_cast<U*>(p.grad_u) + offset;
        angular(g);
        if (t != nullptr) {
          std::fill_n(row_t, tile.values(), A(0));
          tile.add_sums(buffer.t, row_t);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < tile.groups; ++i) {
              const A inverse = row_inverse[r * tile.groups + i];
              t[r * shape.groups + tile.first_group + i] +=
                  row_t[r * tile.groups + i] * inverse * inverse;
            }
        }
        if (sum_rho != nullptr)
          tile.add_columns(buffer.dy_g, buffer.h_rho, sum_rho + from);
        if (sum_a != nullptr)
          tile.add_columns(buffer.dy_g, buffer.h_a, sum_a + from);
        if (sum_k != nullptr)
          tile.add_columns(buffer.dy_k, sum_k + from);
        if (sum_bias != nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < g.count; ++i)
            buffer.t[i] = load(g.grad_y[i]);
          tile.add_columns(buffer.t, sum_bias + from);
        }
      }
    }
  }
}

template <class A>
A dot_of(const A* v, const A* w, int64_t count) {
  return lane_sum<A>(count, [=](int64_t i) { return v[i] * w[i]; });
}

template <class T, class A>
A sum_of(const T* v, int64_t count) {
  return lane_sum<A>(count, [=](int64_t i) { return A(load(v[i])); });
}

// to += part, which starts again from zero.
template <class A>
void add_up(A* part, A* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    to[i] += part[i];
    part[i] = A(0);
  }
}

template <class T, class U, class A>
void grad_dot_planar(const GradDotParams& p, int64_t begin, int64_t end) {
  const Positions& shape = p.shape;
  const int64_t per_group = shape.filters_per_group();
  const auto magnitude =
      pick_magnitude_grad<A, false>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto angular = pick_angular_grad<T, U, A, false>(Angulars{}, p.op.angular, p.kept_is);
  GradTile<A> buffer;
  alignas(64) A total[kTile];  // of t
  const bool rho = p.sums.rho != nullptr, a = p.sums.a != nullptr;
  MagnitudeRow<A> m{};
  m.constants = constants_of<A>(p.op);
  m.times_a = p.op.times_a;
  m.parameters = p.sums.rho != nullptr || p.sums.a != nullptr;
  m.h = buffer.h;
  m.d = buffer.d;
  m.h_rho = buffer.h_rho;
  m.h_a = buffer.h_a;
  GradRow<T, U, A> g{};
  g.inverse_b = buffer.inverse_b;
  g.h = buffer.h;
  g.d = buffer.d;
  g.constants = m.constants;
  g.t = buffer.t;
  g.dy_g = rho || a || p.sums.k != nullptr ? buffer.dy_g : nullptr;
  g.dy_k = p.sums.k != nullptr ? buffer.dy_k : nullptr;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / shape.blocks(), first = task % shape.blocks() * kTile;
    m.count = g.count = std::min(kTile, shape.pixels - first);
    for (int64_t group = 0; group < shape.groups; ++group) {
      const int64_t map = (image * shape.groups + group) * shape.pixels + first;
      m.b = static_cast<const A*>(p.norm) + map;
#pragma omp simd
      for (int64_t i = 0; i < m.count; ++i)
        buffer.inverse_b[i] = A(1) / m.b[i];
      std::fill_n(buffer.t, m.count, A(0));
      std::fill_n(total, m.count, A(0));
      for (int64_t j = 0; j < per_group; ++j) {
        const int64_t filter = group * per_group + j;
        if (j > 0 && j % kAddends == 0)
          add_up(buffer.t, total, m.count);
        if (j == 0 || !shape.h_per_position) {
          m.a = vector_of<A>(p.filters.a, filter);
          m.rho = vector_of<A>(p.filters.rho, filter);
          m.inverse_rho = vector_of<A>(p.filters.inverse_rho, filter);
          magnitude(m);
        }
        const int64_t offset = (image * shape.o + filter) * shape.pixels + first;
        g.grad_y = static_cast<const T*>(p.grad_y) + offset;
        g.kept = static_cast<const T*>(p.kept) + offset;
        g.inverse_a = vector_of<A>(p.filters.inverse_a, filter);
        g.k = vector_of<A>(p.filters.k, filter);
        g.grad_u = static_cast<U*>(p.grad_u) + (p.grad_u_row > 0 ? filter * p.grad_u_row : offset);
        angular(g);
        const int64_t sum = task * shape.o + filter;
        if (rho)
          static_cast<A*>(p.sums.rho)[sum] = dot_of(buffer.dy_g, buffer.h_rho, g.count);
        if (a)
          static_cast<A*>(p.sums.a)[sum] = dot_of(buffer.dy_g, buffer.h_a, g.count);
        if (g.dy_k != nullptr)
          static_cast<A*>(p.sums.k)[sum] = sum_of<A, A>(g.dy_k, g.count);
        if (p.sums.bias != nullptr)
          static_cast<A*>(p.sums.bias)[sum] = sum_of<T, A>(g.grad_y, g.count);
      }
      if (p.t != nullptr) {
        A* t = static_cast<A*>(p.t) + map;
        add_up(buffer.t, total, m.count);
#pragma omp simd
        for (int64_t i = 0; i < m.count; ++i)
          t[i] = total[i] * buffer.inverse_b[i] * buffer.inverse_b[i];
      }
    }
  }
}

template <class T, class U, class A>
void grad_dot(const GradDotParams& p, int64_t begin, int64_t end) {
  if (p.shape.channels_last) {
    grad_dot_channels_last<T, U, A>(p, begin, end);
  } else {
    grad_dot_planar<T, U, A>(p, begin, end);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA
