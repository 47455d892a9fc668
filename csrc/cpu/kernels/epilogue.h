// u -> y = h(a, b) g(u / (a b)) + bias, tile by tile, in place over u allowed.
#pragma once

#include <algorithm>

#include "cpu/kernels/pixels.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/tanh_cosine.h"
#include "cpu/kernels/tile.h"

namespace dcconv::cpu::DCCONV_ISA {

// Buffers of one tile; the first `count` elements are in use.
template <class A>
struct EpilogueTile {
  alignas(64) A b[kTile];
  alignas(64) A inverse_b[kTile];
  alignas(64) A h[kTile];
};

template <class A>
const A* vector_of(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<const A*>(p) + offset;
}

template <class T, class U>
void copy_dot(const U* u, T* dot, int64_t count) {
  using A = typename ComputeType<T>::type;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    dot[i] = Store<T>::from(A(load(u[i])));
}

template <class T, class U, class A>
void epilogue_channels_last(const EpilogueParams& p, int64_t begin, int64_t end) {
  const Positions& shape = p.shape;
  const auto magnitude_rows =
      pick_magnitude_value<A, false>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto magnitude =
      pick_magnitude_value<A, true>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto angular = pick_angular_value<T, U, A, true>(Angulars{}, p.op.angular);
  EpilogueTile<A> buffer;
  alignas(64) A row_inverse[kTile], row_h[kTile];
  MagnitudeRow<A> m{};
  m.constants = constants_of<A>(p.op);
  m.times_a = p.op.times_a;
  AngularRow<T, U, A> g{};
  g.inverse_b = buffer.inverse_b;
  g.h = buffer.h;
  g.constants = m.constants;
  const int64_t tile_rows = shape.tile_rows();
  const int64_t last = std::min(end * shape.task_rows(), shape.n * shape.pixels);
  for (int64_t row = begin * shape.task_rows(); row < last; row += tile_rows) {
    for (int64_t from = 0; from < shape.o; from += kTile) {
      const Tile tile(shape, std::min(tile_rows, last - row), from);
      const A* b = static_cast<const A*>(p.norm) + row * shape.groups + tile.first_group;
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
        magnitude_rows(m);
        tile.spread(row_h, buffer.h);
      } else {
        tile.spread(b, buffer.b);
        m.count = tile.count();
        m.b = buffer.b;
        m.h = buffer.h;
        magnitude(m);
      }
      const int64_t offset = row * shape.o + from;
      g.count = tile.count();
      g.u = static_cast<const U*>(p.u) + offset;
      g.inverse_a = vector_of<A>(p.filters.inverse_a, from);
      g.k = vector_of<A>(p.filters.k, from);
      g.bias = vector_of<A>(p.bias, from);
      g.y = static_cast<T*>(p.y) + offset;
      if (p.dot != nullptr)
        copy_dot(g.u, static_cast<T*>(p.dot) + offset, g.count);
      angular(g);
    }
  }
}

template <class T, class U, class A>
void epilogue_planar(const EpilogueParams& p, int64_t begin, int64_t end) {
  const Positions& shape = p.shape;
  const int64_t per_group = shape.filters_per_group();
  const auto magnitude =
      pick_magnitude_value<A, false>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude);
  const auto angular = pick_angular_value<T, U, A, false>(Angulars{}, p.op.angular);
  EpilogueTile<A> tile;
  MagnitudeRow<A> m{};
  m.constants = constants_of<A>(p.op);
  m.times_a = p.op.times_a;
  m.h = tile.h;
  AngularRow<T, U, A> g{};
  g.inverse_b = tile.inverse_b;
  g.h = tile.h;
  g.constants = m.constants;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / shape.blocks(), first = task % shape.blocks() * kTile;
    m.count = g.count = std::min(kTile, shape.pixels - first);
    for (int64_t group = 0; group < shape.groups; ++group) {
      m.b = static_cast<const A*>(p.norm) + (image * shape.groups + group) * shape.pixels + first;
#pragma omp simd
      for (int64_t i = 0; i < m.count; ++i)
        tile.inverse_b[i] = A(1) / m.b[i];
      for (int64_t j = 0; j < per_group; ++j) {
        const int64_t filter = group * per_group + j;
        if (j == 0 || !shape.h_per_position) {
          m.a = vector_of<A>(p.filters.a, filter);
          m.rho = vector_of<A>(p.filters.rho, filter);
          m.inverse_rho = vector_of<A>(p.filters.inverse_rho, filter);
          magnitude(m);
        }
        const int64_t offset = (image * shape.o + filter) * shape.pixels + first;
        g.u = static_cast<const U*>(p.u) + offset;
        g.inverse_a = vector_of<A>(p.filters.inverse_a, filter);
        g.k = vector_of<A>(p.filters.k, filter);
        g.bias = vector_of<A>(p.bias, filter);
        g.y = static_cast<T*>(p.y) + offset;
        if (p.dot != nullptr)
          copy_dot(g.u, static_cast<T*>(p.dot) + offset, g.count);
        angular(g);
      }
    }
  }
}

// Tanh x cosine of a row of filters.
template <bool kSaturates, class T, class U>
void tanh_cosine_row(
    const EpilogueParams& p, int64_t filter, int64_t end, float b, int64_t offset
) {
  const Vector s = Vector{} + b * b;
  const U* u = static_cast<const U*>(p.u) + offset;
  T* y = static_cast<T*>(p.y) + offset;
  T* dot = p.dot == nullptr ? nullptr : static_cast<T*>(p.dot) + offset;
  for (; filter < end; filter += kLanes) {
    Vector v;
    load_pixels<float>(v, u + filter);
    if (dot != nullptr)
      store_pixels(dot + filter, v);
    store_pixels(y + filter, TanhCosine(*p.scales, filter).value<kSaturates>(v, s));
  }
}

template <class T, class U>
void tanh_cosine_channels_last(const EpilogueParams& p, int64_t begin, int64_t end) {
  const Positions& shape = p.shape;
  const int64_t per_group = shape.filters_per_group();
  const float* norm = static_cast<const float*>(p.norm);
  float most = 0.0f;
  for (int64_t i = 0; i * kScaleGroup < shape.o; ++i)
    most = std::max(most, p.scales->most[i]);
  const int64_t last = std::min(end * shape.task_rows(), shape.n * shape.pixels);
  for (int64_t row = begin * shape.task_rows(); row < last; ++row)
    for (int64_t group = 0; group < shape.groups; ++group) {
      const float b = norm[row * shape.groups + group];
      const int64_t from = group * per_group;
      const auto finish =
          b * b * most > kSaturated ? tanh_cosine_row<true, T, U> : tanh_cosine_row<false, T, U>;
      finish(p, from, from + per_group, b, row * shape.o);
    }
}

template <class T, class U, class A>
void epilogue(const EpilogueParams& p, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<A, float>)
    if (p.scales != nullptr && !p.shape.h_per_position && p.shape.channels_last &&
        p.shape.filters_per_group() % kLanes == 0) {
      tanh_cosine_channels_last<T, U>(p, begin, end);
      return;
    }
  if (p.shape.channels_last) {
    epilogue_channels_last<T, U, A>(p, begin, end);
  } else {
    epilogue_planar<T, U, A>(p, begin, end);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA
