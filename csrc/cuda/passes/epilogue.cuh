// u -> y = h(a, b) g(u / (a b)) + bias in one pass, in place over u allowed. The window sum of b is
// taken on the fly, once per position and group.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda/support/functions.cuh"
#include "cuda/support/lanes.cuh"
#include "cuda/support/window.cuh"

namespace dcconv::cuda {

struct EpilogueArgs {
  EpilogueParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  PixelOf pixel_of;
  bool per_position;  // h depends on the position alone, up to a factor a
};

// Rows of a tile per thread: few enough for the shared memory, enough to spread the barrier.
constexpr int kEpilogueRows = 4;

// Threads per multiprocessor that the registers allow (at most 128 each).
constexpr int kEpilogueResident = 2 * kThreads;

// What a thread keeps of V filters.
template <class A, int V>
struct FilterValues {
  A inverse_a[V];
  A rho[V];
  A inverse_rho[V];

  __device__ __forceinline__ void load(const FilterOperands& f, int64_t first, int step) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t o = first + j * step;
      inverse_a[j] = A(1) / static_cast<const A*>(f.a)[o];
      const Radius<A> radius = radius_of<A>(f, o);
      rho[j] = radius.rho;
      inverse_rho[j] = radius.inverse;
    }
  }
};

// Values of filters first, first + step, ..., or `otherwise` where they are not wanted.
template <class A, int V>
__device__ __forceinline__ void
filter_values(const void* values, bool wanted, int64_t first, int step, A otherwise, A (&out)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j)
    out[j] = wanted ? static_cast<const A*>(values)[first + j * step] : otherwise;
}

__device__ __forceinline__ bool wants_a(const Operator& op) {
  return op.times_a || op.magnitude >= static_cast<int>(Magnitudes::size);
}

// Elements of a vector that are worked on at a time: fewer temporaries in registers.
template <int V>
constexpr int kPart = V < 4 ? V : 4;

// h of elements [from, from + P) whose magnitudes depend on the filter.
template <class A, int V, int P>
__device__ __forceinline__ void filter_magnitudes(
    const Operator& op,
    const Constants<A>& constants,
    const FilterValues<A, V>& filters,
    int from,
    const A (&a)[P],
    const A (&b)[V],
    A (&h)[P]
) {
  with_magnitude(op.magnitude, [&](auto type) {
    using Function = decltype(type);
    if constexpr (Function::uses_rho) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const Radius<A> radius{filters.rho[from + j], filters.inverse_rho[from + j]};
        h[j] = Function::value(a[j], b[from + j], radius, constants);
      }
    }
  });
}

// One vector: position operands inverse_b and b_or_h, filter operands of filters first + j step.
template <class G, class T, class A, int V>
__device__ __forceinline__ Vector<T, V> epilogue_vector(
    const EpilogueArgs& args,
    const Constants<A>& constants,
    const FilterValues<A, V>& filters,
    int64_t first,
    int step,
    const Vector<T, V>& u,
    const A (&inverse_b)[V],
    const A (&b_or_h)[V]
) {
  constexpr int kP = kPart<V>;
  const EpilogueParams& p = args.p;
  Vector<T, V> y;
#pragma unroll
  for (int from = 0; from < V; from += kP) {
    const int64_t filter = first + from * step;
    A a[kP], h[kP], k[kP], c[kP], g[kP];
    filter_values(p.filters.a, wants_a(p.op), filter, step, A(1), a);
    if (args.per_position) {
#pragma unroll
      for (int j = 0; j < kP; ++j)
        h[j] = b_or_h[from + j];
    } else {
      filter_magnitudes(p.op, constants, filters, from, a, b_or_h, h);
    }
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      k[j] = kUsesK<G> ? curvature_of<A>(p.filters, filter + j * step) : A(1);
      c[j] = load(u.at[from + j]) * (filters.inverse_a[from + j] * inverse_b[from + j]);
      h[j] = p.op.times_a ? h[j] * a[j] : h[j];
    }
    angular_values<G>(p.op, constants, c, k, g);
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      A value = h[j] * g[j];
      if (p.bias != nullptr)
        value += load(static_cast<const T*>(p.bias)[filter + j * step]);
      y.at[from + j] = Store<T>::from(value);
    }
  }
  return y;
}

// b of one position and group, written out where it is new.
template <class A>
__device__ __forceinline__ A norm_of(const EpilogueArgs& args, int64_t position, int group) {
  const EpilogueParams& p = args.p;
  const A* map = static_cast<const A*>(p.map);
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  if (p.map_is_norm && p.channels_last)
    return map[position * p.groups + group];
  const Pixel at = args.pixel_of(position);
  const MapPlane output = map_plane(at.image, group, outputs, p.groups, p.channels_last);
  const int64_t offset =
      output.base + (int64_t(at.y) * p.window.columns.output + at.x) * output.step;
  if (p.map_is_norm)
    return map[offset];
  const MapPlane input = map_plane(at.image, group, inputs, p.groups, p.channels_last);
  const A b = sqrt_of(window_sum(p.window, map, input, at.y, at.x) + A(p.eps));
  if (p.norm != nullptr)
    static_cast<A*>(p.norm)[offset] = b;
  return b;
}

template <class T, class G, int V>
__global__ void __launch_bounds__(kThreads, 2) epilogue_channels_last_kernel(EpilogueArgs args) {
  using A = typename ComputeType<T>::type;
  const EpilogueParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const Constants<A> constants = constants_of<A>(p.op);
  const int tile_rows = lanes.rows * kEpilogueRows, per_group = p.o / p.groups;
  const int tile_values = tile_rows * lanes.chunk_groups;
  SharedMemory shared;
  // Two halves, written in turn: one barrier a tile.
  A* inverse_norms = shared.take<A>(2 * tile_values);
  A* norms_or_h = shared.take<A>(2 * tile_values);
  const int64_t positions = p.n * int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t tiles = (positions + tile_rows - 1) / tile_rows;
  const T* u = static_cast<const T*>(p.u);
  T* y = static_cast<T*>(p.y);
  int half = 0;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const int channel = (chunk + lane.column) * V;
    const bool active = lane.row < lanes.rows && channel < p.o;
    const int chunk_end = at_most((chunk + lanes.columns) * V, p.o);
    const int first_group = chunk * V / per_group;
    const int groups = (chunk_end - 1) / per_group + 1 - first_group;
    const int own_group = channel / per_group - first_group;
    FilterValues<A, V> filters{};
    if (active)
      filters.load(p.filters, channel, 1);
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_rows;
      const int rows = static_cast<int>(at_most(int64_t(tile_rows), positions - first));
      const int64_t offset = first * p.o + channel;
      // Two vectors are on their way while a third is worked on.
      const auto fetch = [&](int row) {
        Vector<T, V> v{};
        if (active && row < rows)
          v = load_vector<T, V>(u + offset + int64_t(row) * p.o);
        return v;
      };
      Vector<T, V> current = fetch(lane.row), next = fetch(lane.row + lanes.rows);
      A* inverse_b = inverse_norms + half * tile_values;
      A* b_or_h = norms_or_h + half * tile_values;
      for (int i = static_cast<int>(threadIdx.x); i < rows * groups; i += lanes.threads) {
        const int row = groups == 1 ? i : i / groups, group = first_group + i - row * groups;
        const A b = norm_of<A>(args, first + row, group);
        inverse_b[i] = A(1) / b;
        b_or_h[i] = args.per_position
                        ? position_magnitude(p.op, constants, b, radius_of<A>(p.filters, 0))
                        : b;
      }
      __syncthreads();
      if (!active)
        continue;
#pragma unroll 1
      for (int row = lane.row; row < rows; row += lanes.rows) {
        const Vector<T, V> after = fetch(row + 2 * lanes.rows);
        A row_inverse[V], row_value[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          row_inverse[j] = inverse_b[row * groups + own_group];
          row_value[j] = b_or_h[row * groups + own_group];
        }
        store_vector(
            y + offset + int64_t(row) * p.o,
            epilogue_vector<G>(
                args, constants, filters, channel, 1, current, row_inverse, row_value
            )
        );
        current = next;
        next = after;
      }
    }
  }
}

template <class T, class G, int V>
__global__ void __launch_bounds__(kThreads, 2) epilogue_contiguous_kernel(EpilogueArgs args) {
  using A = typename ComputeType<T>::type;
  const EpilogueParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways;
  const Constants<A> constants = constants_of<A>(p.op);
  const int span = kWarp * V, tile_positions = span * args.plane_lanes.tiles;
  const int per_group = p.o / p.groups;
  SharedMemory shared;
  A* inverse_norms = shared.take<A>(2 * tile_positions);
  A* norms_or_h = shared.take<A>(2 * tile_positions);
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t positions = p.n * outputs;
  const int64_t tiles = (positions + tile_positions - 1) / tile_positions;
  const int own = lane.tile * span + lane.lane * V;
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_positions;
      const int count = static_cast<int>(at_most(int64_t(tile_positions), positions - first));
      A* inverse_b = inverse_norms + half * tile_positions;
      A* b_or_h = norms_or_h + half * tile_positions;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const A b = norm_of<A>(args, first + i, group);
        inverse_b[i] = A(1) / b;
        b_or_h[i] = args.per_position
                        ? position_magnitude(p.op, constants, b, radius_of<A>(p.filters, 0))
                        : b;
      }
      __syncthreads();
      if (own >= count)
        continue;
      A own_inverse[V], own_value[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        own_inverse[j] = inverse_b[own + j];
        own_value[j] = b_or_h[own + j];
      }
      const Pixel at = args.pixel_of(first + own);
      const int64_t base = (at.image * p.o + int64_t(group) * per_group) * outputs +
                           int64_t(at.y) * p.window.columns.output + at.x;
      const T* u = static_cast<const T*>(p.u) + base;
      T* y = static_cast<T*>(p.y) + base;
      const auto fetch = [&](int c) {
        Vector<T, V> v{};
        if (c < per_group)
          v = load_vector<T, V>(u + c * outputs);
        return v;
      };
      Vector<T, V> current = fetch(lane.way), next = fetch(lane.way + ways);
#pragma unroll 1
      for (int c = lane.way; c < per_group; c += ways) {
        const Vector<T, V> after = fetch(c + 2 * ways);
        const int64_t filter = int64_t(group) * per_group + c;
        FilterValues<A, V> filters;
        filters.load(p.filters, filter, 0);
        store_vector(
            y + c * outputs,
            epilogue_vector<G>(args, constants, filters, filter, 0, current, own_inverse, own_value)
        );
        current = next;
        next = after;
      }
    }
  }
}

inline EpilogueArgs epilogue_args(const EpilogueParams& p, int width) {
  return {
      p,
      p.channels_last ? row_lanes(p.o, p.groups, width) : RowLanes{},
      plane_lanes(p.o / p.groups),
      PixelOf(p.n, p.window.rows.output, p.window.columns.output),
      h_per_position(Magnitudes{}, p.op, p.filters)
  };
}

template <class T, class G, int V>
void launch_epilogue_channels_last(const EpilogueParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const EpilogueArgs args = epilogue_args(p, V);
  const int64_t positions = p.n * int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t tile_rows = int64_t(args.row_lanes.rows) * kEpilogueRows;
  const int64_t tile_values = tile_rows * args.row_lanes.chunk_groups;
  launch(
      "epilogue_channels_last",
      epilogue_channels_last_kernel<T, G, V>,
      Grid{persistent_blocks(
          ceil_div(positions, tile_rows), args.row_lanes.threads, kEpilogueResident
      )},
      args.row_lanes.threads,
      SharedBytes().take<A>(2 * tile_values).template take<A>(2 * tile_values).total(),
      stream,
      args
  );
}

template <class T, class G, int V>
void launch_epilogue_contiguous(const EpilogueParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const EpilogueArgs args = epilogue_args(p, V);
  const int64_t positions = p.n * int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t tile_positions = int64_t(kWarp) * V * args.plane_lanes.tiles;
  launch(
      "epilogue_contiguous",
      epilogue_contiguous_kernel<T, G, V>,
      Grid{
          persistent_blocks(ceil_div(positions, tile_positions), kThreads, kEpilogueResident),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      SharedBytes().take<A>(2 * tile_positions).template take<A>(2 * tile_positions).total(),
      stream,
      args
  );
}

// Whether 16-byte accesses work: whole vectors within one group (or plane), aligned.
template <class T>
bool takes_wide_vectors(
    bool channels_last, int64_t per_group, int64_t pixels, std::initializer_list<const void*> all
) {
  bool wide = (channels_last ? per_group : pixels) % kWide<T> == 0;
  for (const void* p : all)
    wide = wide && aligned16(p);
  return wide;
}

// An instantiation per angular function where speed matters: channels last, 16-byte vectors, not
// double. Everywhere else the function is chosen at run time.
template <class T, class... G>
void epilogue_by_angular(TypeList<G...>, const EpilogueParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  if (p.n == 0)
    return;
  const bool wide = takes_wide_vectors<T>(p.channels_last, p.o / p.groups, outputs, {p.u, p.y});
  if (!p.channels_last) {
    const auto run = wide ? launch_epilogue_contiguous<T, AnyAngular, kV>
                          : launch_epilogue_contiguous<T, AnyAngular, 1>;
    run(p, stream);
  } else if (!wide) {
    launch_epilogue_channels_last<T, AnyAngular, 1>(p, stream);
  } else if constexpr (std::is_same<T, double>::value) {
    launch_epilogue_channels_last<T, AnyAngular, kV>(p, stream);
  } else {
    static constexpr void (*table[])(const EpilogueParams&, Stream) = {
        launch_epilogue_channels_last<T, G, kV>...
    };
    table[p.op.angular](p, stream);
  }
}

template <class T>
void epilogue_typed(const EpilogueParams& p, Stream stream) {
  epilogue_by_angular<T>(Angulars{}, p, stream);
}

}  // namespace dcconv::cuda
