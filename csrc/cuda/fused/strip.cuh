// What the direct kernels share: strips of neighbouring positions per thread, the sums over taps
// that a strip reuses from registers, and the end of the forward pass.
#pragma once

#include "cuda/passes/elements.cuh"
#include "cuda/support/lanes.cuh"
#include "cuda/support/window.cuh"

namespace dcconv::cuda {

// Positions of a strip.
constexpr int kStrip = 4;

// Channels of a vector: 16 bytes of the maps in float, which are larger than x and y in half.
constexpr int kDirectVector = 4;

// Most vectors of channels that a block works on: 2 sectors of a line of x, and more positions.
constexpr int kDirectColumns = 16;

// One axis of a tensor: how far apart in memory neighbours are.
struct Steps {
  int64_t along;   // the strip
  int64_t across;  // it
};

// A window in the strip's terms: along runs over columns in channels last, over rows otherwise, so
// that neighbouring threads always have neighbouring elements.
struct StripGeometry {
  WindowAxis along, across;
  Steps in, out, map;  // of x, y and the map over positions
  Steps tap;           // of the weight of a filter and a channel
};

// Steps of an image that is `width` wide, its pixels `count` elements apart in channels last.
inline Steps steps_of(bool channels_last, int64_t width, int64_t count) {
  Steps steps{width, 1};
  if (channels_last)
    steps = {count, width * count};
  return steps;
}

inline StripGeometry strip_geometry(
    const Window& w, bool channels_last, int64_t channels, int64_t filters, int64_t groups
) {
  StripGeometry g{};
  g.along = channels_last ? w.columns : w.rows;
  g.across = channels_last ? w.rows : w.columns;
  g.in = steps_of(channels_last, w.columns.input, channels);
  g.out = steps_of(channels_last, w.columns.output, filters);
  g.map = steps_of(channels_last, w.columns.output, groups);
  g.tap = steps_of(channels_last, w.columns.kernel, 1);
  return g;
}

// Which strips a block of threads has. Channels last: `columns` vectors of channels side by side
// times `rows` strips, the strips of a block one after the other, so that rows of the input stay in
// its cache. Contiguous: a strip per thread and turn, flat over images, channels and pixels.
struct StripLanes {
  PixelOf strip_of;    // [images or planes, rows, strips of a row] or [planes, strips, columns]
  PixelOf channel_of;  // contiguous: plane -> image, channel
  int64_t strips;
  int64_t block_strips;  // channels last
  int columns, rows, threads;
  int chunks;  // of channels
};

inline StripLanes strip_lanes(
    int64_t n, int channels, int height, int width, bool channels_last, int vector, int columns
) {
  StripLanes lanes{};
  lanes.threads = kThreads;
  if (!channels_last) {
    const int strips = static_cast<int>(ceil_div(height, kStrip));
    lanes.strip_of = PixelOf(n * channels, strips, width);
    lanes.channel_of = PixelOf(n, channels, 1);
    lanes.strips = n * channels * strips * width;
    return lanes;
  }
  const int strips = static_cast<int>(ceil_div(width, kStrip)), vectors = channels / vector;
  lanes.strip_of = PixelOf(n, height, strips);
  lanes.strips = n * height * strips;
  lanes.chunks = static_cast<int>(ceil_div(vectors, columns));
  lanes.columns = static_cast<int>(ceil_div(vectors, lanes.chunks));
  lanes.rows = kThreads / lanes.columns;
  lanes.threads = static_cast<int>(ceil_div(lanes.columns * lanes.rows, kWarp)) * kWarp;
  return lanes;
}

// The grid of a pass over strips; in channels last the blocks' shares of them.
inline Grid strip_grid(StripLanes& lanes, bool channels_last, int resident) {
  if (lanes.strips == 0)
    return {0};
  if (!channels_last)
    return {persistent_blocks(ceil_div(lanes.strips, kThreads), kThreads, resident)};
  const int64_t turns = ceil_div(lanes.strips, lanes.rows);
  const int64_t blocks = std::max<int64_t>(
      persistent_blocks(turns * lanes.chunks, lanes.threads, resident) / lanes.chunks, 1
  );
  lanes.block_strips = ceil_div(turns, blocks) * lanes.rows;
  return {ceil_div(lanes.strips, lanes.block_strips), lanes.chunks};
}

template <class T, class A, int V>
__device__ __forceinline__ void load_values(const T* from, A (&to)[V]) {
  const Vector<T, V> v = load_vector<T, V>(from);
#pragma unroll
  for (int j = 0; j < V; ++j)
    to[j] = load(v.at[j]);
}

template <class T, class A, int V>
__device__ __forceinline__ void squares_of(const Vector<T, V>& x, A (&squares)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A value = load(x.at[v]);
    squares[v] = value * value;
  }
}

// Adds what element c of a line says to the positions of a strip whose windows see it.
template <int K, class A, int V>
__device__ __forceinline__ void add_to_windows(int c, const A (&values)[V], A (&sum)[kStrip][V]) {
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    if (c < q || c >= q + K)
      continue;
#pragma unroll
    for (int v = 0; v < V; ++v)
      sum[q][v] += values[v];
  }
}

// dot[q] += w x over one row of K taps; weight(column of the tap, values).
template <int K, class T, class A, int V, int kLoads, class Weight>
__device__ __forceinline__ void
row_products(const Vector<T, V> (&loaded)[kLoads], Weight&& weight, A (&dot)[kStrip][V]) {
  if constexpr (std::is_same<T, A>::value) {
    // Nothing to convert: a tap at a time, which needs fewer registers.
#pragma unroll
    for (int s = 0; s < K; ++s) {
      A w[V];
      weight(s, w);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          dot[q][v] += w[v] * load(loaded[q + s].at[v]);
      }
    }
  } else {
    A w[K][V];
#pragma unroll
    for (int s = 0; s < K; ++s)
      weight(s, w[s]);
#pragma unroll
    for (int c = 0; c < kLoads; ++c) {
      A x[V];
#pragma unroll
      for (int v = 0; v < V; ++v)
        x[v] = load(loaded[c].at[v]);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        if (c < q || c >= q + K)
          continue;
#pragma unroll
        for (int v = 0; v < V; ++v)
          dot[q][v] += w[c - q][v] * x[v];
      }
    }
  }
}

// dot[q] += w x and, with `squares`, sum[q] += x x over the taps of the strip that begins at output
// (across, along). K > 0: a K x K window of stride 1 without dilation, padded with zeros, every
// element loaded once per row of taps; K = 0: any. base: of image and channel; weight(tap, values).
template <int K, class T, class A, int V, class Weight>
__device__ __forceinline__ void strip_sums(
    const StripGeometry& g,
    const T* base,
    int across,
    int along,
    bool squares,
    Weight&& weight,
    A (&dot)[kStrip][V],
    A (&sum)[kStrip][V]
) {
  const WindowAxis& rows = g.across;
  const WindowAxis& line = g.along;
  const int top = across * rows.stride - rows.before;
  const int left = along * line.stride - line.before;
  if constexpr (K > 0) {
    constexpr int kLoads = kStrip - 1 + K;
#pragma unroll 1
    for (int r = 0; r < K; ++r) {
      const int i = top + r;
      if (i < 0 || i >= rows.input)
        continue;
      const T* from = base + i * g.in.across;
      Vector<T, V> loaded[kLoads];
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const int j = left + c;
        loaded[c] = Vector<T, V>{};
        if (j >= 0 && j < line.input)
          loaded[c] = load_vector<T, V>(from + j * g.in.along);
      }
      if (squares) {
#pragma unroll
        for (int c = 0; c < kLoads; ++c) {
          A square[V];
          squares_of(loaded[c], square);
          add_to_windows<K>(c, square, sum);
        }
      }
      row_products<K>(
          loaded,
          [&](int s, A(&w)[V]) { weight(static_cast<int>(r * g.tap.across + s * g.tap.along), w); },
          dot
      );
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < rows.kernel; ++r) {
      const int i = source_of(rows, top + r * rows.dilation);
      if (i < 0)
        continue;
      const T* from = base + i * g.in.across;
#pragma unroll 1
      for (int s = 0; s < line.kernel; ++s) {
        A w[V];
        weight(static_cast<int>(r * g.tap.across + s * g.tap.along), w);
#pragma unroll
        for (int q = 0; q < kStrip; ++q) {
          // Positions past the end of the line repeat the last one: never stored.
          const int at = at_most(along + q, line.output - 1) * line.stride - line.before;
          const int j = source_of(line, at + s * line.dilation);
          if (j < 0)
            continue;
          const Vector<T, V> x = load_vector<T, V>(from + j * g.in.along);
          A square[V];
          squares_of(x, square);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            dot[q][v] += w[v] * load(x.at[v]);
            if (squares)
              sum[q][v] += square[v];
          }
        }
      }
    }
  }
}

// sum[q] += values of a map over the same windows, K x K at stride 1; value(i, j, values).
template <int K, class A, int V, class Value>
__device__ __forceinline__ void
strip_box(const StripGeometry& g, int across, int along, Value&& value, A (&sum)[kStrip][V]) {
  const int top = across - g.across.before, left = along - g.along.before;
#pragma unroll 1
  for (int r = 0; r < K; ++r) {
    const int i = top + r;
    if (i < 0 || i >= g.across.input)
      continue;
#pragma unroll
    for (int c = 0; c < kStrip - 1 + K; ++c) {
      const int j = left + c;
      if (j < 0 || j >= g.along.input)
        continue;
      A values[V];
      value(i, j, values);
      add_to_windows<K>(c, values, sum);
    }
  }
}

// The first position of a strip leaves, the others move up: code over the positions of a strip
// stands once, without an array that is indexed at run time.
template <class A, int V>
__device__ __forceinline__ void next_position(A (&values)[kStrip][V]) {
#pragma unroll
  for (int q = 0; q + 1 < kStrip; ++q) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      values[q][v] = values[q + 1][v];
  }
}

// y of V elements, each with a b of its own.
template <class T, class A, int V>
__device__ __forceinline__ Vector<T, V> direct_outputs(
    const FusedParams& p,
    const Constants<A>& constants,
    const Filters<Each<A, V>>& filters,
    int64_t first,
    const A (&dot)[V],
    const A (&b)[V]
) {
  A a[V], h[V], k[V], c[V], g[V];
  filter_values<A>(p.filters.a, wants_a(p.op), first, 1, A(1), a);
  with_magnitude(p.op.magnitude, [&](auto type) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Radius<A> radius{filters.rho[j], filters.inverse_rho[j]};
      h[j] = decltype(type)::value(a[j], b[j], radius, constants);
    }
  });
#pragma unroll
  for (int j = 0; j < V; ++j) {
    k[j] = curvature_of<A>(p.filters, first + j);
    c[j] = dot[j] * (filters.inverse_a[j] * (A(1) / b[j]));
    h[j] = p.op.times_a ? h[j] * a[j] : h[j];
  }
  angular_values<AnyAngular>(p.op, constants, c, k, g);
  Vector<T, V> y;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A value = h[j] * g[j];
    if (p.bias != nullptr)
      value += load(static_cast<const T*>(p.bias)[first + j]);
    y.at[j] = Store<T>::from(value);
  }
  return y;
}

// y and, where it is kept, u of V elements.
template <class T, class A, int V>
__device__ __forceinline__ void store_outputs(
    const FusedParams& p,
    const Constants<A>& constants,
    const Filters<Each<A, V>>& filters,
    int64_t first,
    const A (&dot)[V],
    const A (&b)[V],
    int64_t offset
) {
  store_vector(
      static_cast<T*>(p.y) + offset, direct_outputs<T, A, V>(p, constants, filters, first, dot, b)
  );
  if (p.dot == nullptr)
    return;
  Vector<T, V> u;
#pragma unroll
  for (int j = 0; j < V; ++j)
    u.at[j] = Store<T>::from(dot[j]);
  store_vector(static_cast<T*>(p.dot) + offset, u);
}

// b of V elements and their outputs, at `offset` of y and `map` of the map over positions. writes:
// whether the thread is the one of its group that writes b.
template <class T, class A, int V>
__device__ __forceinline__ void finish_position(
    const FusedParams& p,
    const Constants<A>& constants,
    const Filters<Each<A, V>>& filters,
    int64_t first,
    const A (&dot)[V],
    const A (&sum)[V],
    int64_t offset,
    int64_t map,
    bool writes
) {
  A b[V];
  if (p.map_is_norm) {
    load_values(static_cast<const A*>(p.map) + map, b);
  } else {
    Vector<A, V> norm;
#pragma unroll
    for (int j = 0; j < V; ++j)
      norm.at[j] = b[j] = sqrt_of(sum[j] + A(p.eps));
    if (p.norm != nullptr && writes)
      store_vector(static_cast<A*>(p.norm) + map, norm);
  }
  store_outputs<T, A, V>(p, constants, filters, first, dot, b, offset);
}

// Where the weight of filter o, channel c of its group and a tap lies.
__device__ __forceinline__ int64_t
weight_offset(int64_t o, int c, int tap, int per_group, int taps, bool channels_last) {
  return channels_last ? (o * taps + tap) * per_group + c : (o * per_group + c) * taps + tap;
}

}  // namespace dcconv::cuda
