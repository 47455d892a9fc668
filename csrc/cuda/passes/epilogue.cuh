// u -> y = h(a, b) g(u / (a b)) + bias in one pass, in place over u allowed.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda/passes/elements.cuh"
#include "cuda/passes/tiles.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

struct EpilogueArgs {
  EpilogueParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  PixelOf pixel_of;
  int turns;          // channels last: of a tile
  bool per_position;  // h depends on the position alone, up to a factor a
};

// Blocks of a multiprocessor that registers allow, by whether the functions are known.
template <class M>
constexpr int kEpilogueBlocks = std::is_same<M, AnyMagnitude>::value ? 2 : 3;

// Vectors of a thread in a tile, at most.
constexpr int kEpilogueTurns = 16;

// Vectors on their way: three of four slots.
constexpr int kEpilogueSlots = 4;

template <class M, class G, class A>
__device__ __forceinline__ Vector<A, 2>
output_position(const EpilogueArgs& args, const Constants<A>& constants, A b) {
  const A inverse = reciprocal_of(b);
  A value = b;
  if (std::is_same<M, PerPosition>::value || args.per_position)
    value = position_magnitude(args.p.op, constants, b, radius_of<A>(args.p.filters, 0));
  if constexpr (kWholeScale<M, G>)
    value *= inverse;
  return {{inverse, value}};
}

// y of one vector of u.
template <class M, class G, class T, class E, class F, class N, int V>
__device__ __forceinline__ Vector<T, V> outputs_of(
    const EpilogueArgs& args,
    const Constants<E>& constants,
    const Filters<F>& filters,
    int64_t first,
    int step,
    const OutputPositions<N>& positions,
    const Vector<T, V>& vector
) {
  using A = typename ComputeType<T>::type;
  A u[V], y[V];
  unpack(vector, u);
  if constexpr (std::is_same<M, AnyMagnitude>::value) {
    chosen_output_elements<G>(
        args.p.op,
        args.p.filters,
        args.per_position,
        constants,
        filters,
        first,
        step,
        positions,
        u,
        y
    );
  } else {
    output_elements<M, G>(constants, filters, positions, u, y);
  }
  return pack<T, V>(y);
}

template <class T, class M, class G, int V>
__global__ void
__launch_bounds__(kThreads, kEpilogueBlocks<M>) epilogue_channels_last_kernel(EpilogueArgs args) {
  using A = typename ComputeType<T>::type;
  using E = typename EvaluationType<T>::type;
  const EpilogueParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const Constants<A> constants = constants_of<A>(p.op);
  const Constants<E> own_constants = constants_of<E>(p.op);
  const int tile_rows = lanes.rows * args.turns, tile_values = tile_rows * lanes.chunk_groups;
  SharedMemory shared;
  VectorRing<T, V, 1, kEpilogueSlots> ring(shared);
  Vector<A, 2>* position_values = shared.take<Vector<A, 2>>(2 * tile_values);
  const RowRange range(p.positions, lanes);
  const int64_t step = int64_t(lanes.rows) * p.o;
  const A* norm = static_cast<const A*>(p.norm);
  int half = 0;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const ChunkPlace place(lanes, lane, chunk, V, p.o, p.o / p.groups);
    Filters<Each<A, V>> filters{};
    if (place.active)
      load_filters<T>(p.filters, p.bias, place.channel, filters);
    const int64_t offset = (range.begin + lane.row) * p.o + place.channel;
    T* y = static_cast<T*>(p.y) + offset;
    RowStream<T, V, 1, kEpilogueSlots> stream(
        ring,
        {static_cast<const T*>(p.u)},
        offset,
        step,
        place.active ? range.turns(lane.row, lanes) : 0
    );
    for (int64_t first = range.begin; first < range.end; first += tile_rows, half ^= 1) {
      const int rows = static_cast<int>(at_most(int64_t(tile_rows), range.end - first));
      Vector<A, 2>* values = position_values + half * tile_values;
      for (int i = static_cast<int>(threadIdx.x); i < rows * place.groups; i += lanes.threads) {
        const int row = place.groups == 1 ? i : i / place.groups;
        const int group = place.first_group + i - row * place.groups;
        values[i] = output_position<M, G>(args, constants, norm[(first + row) * p.groups + group]);
      }
      __syncthreads();
      if (!place.active)
        continue;
      const Vector<A, 2>* own = values + lane.row * place.groups + place.own_group;
#pragma unroll 1
      for (int row = lane.row; row < rows; row += lanes.rows) {
        Vector<T, V> u[1];
        stream.take(u);
        const OutputPositions<Uniform<A>> position{{own->at[0]}, {own->at[1]}};
        store_vector(
            y, outputs_of<M, G>(args, own_constants, filters, place.channel, 1, position, u[0])
        );
        stream.advance();
        own += lanes.rows * place.groups;
        y += step;
      }
    }
  }
}

template <class T, class M, class G, int V>
__global__ void
__launch_bounds__(kThreads, kEpilogueBlocks<M>) epilogue_contiguous_kernel(EpilogueArgs args) {
  using A = typename ComputeType<T>::type;
  using E = typename EvaluationType<T>::type;
  const EpilogueParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways, per_group = p.o / p.groups;
  const Constants<A> constants = constants_of<A>(p.op);
  const Constants<E> own_constants = constants_of<E>(p.op);
  const int span = kWarp * V, tile_positions = span * args.plane_lanes.tiles;
  SharedMemory shared;
  VectorRing<T, V, 1, kEpilogueSlots> ring(shared);
  FilterTable<A> table(shared);
  A* inverse_norms = shared.take<A>(2 * tile_positions);
  A* norms_or_h = shared.take<A>(2 * tile_positions);
  const int64_t step = ways * p.pixels;
  const Share tiles((p.positions + tile_positions - 1) / tile_positions);
  const PlanePlace place{
      p.pixels, p.o, p.positions, tile_positions, lane.tile * span + lane.lane * V
  };
  const A* norm = static_cast<const A*>(p.norm);
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const T* u = static_cast<const T*>(p.u) + int64_t(group) * per_group * p.pixels;
    T* y = static_cast<T*>(p.y) + int64_t(group) * per_group * p.pixels;
    for (int begin = 0; begin < per_group; begin += FilterTable<A>::kFilters) {
      const int end = at_most(begin + FilterTable<A>::kFilters, per_group);
      const int64_t first_filter = int64_t(group) * per_group;
      table.template fill<T>(p.filters, p.bias, first_filter + begin, end - begin);
      PlaneStream<T, V, 1, kEpilogueSlots> stream(
          ring, {u}, place, args.pixel_of, tiles, begin + lane.way, end, ways
      );
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, half ^= 1) {
        const int64_t first = tile * tile_positions;
        const int count = static_cast<int>(at_most(int64_t(tile_positions), p.positions - first));
        A* inverse_b = inverse_norms + half * tile_positions;
        A* b_or_h = norms_or_h + half * tile_positions;
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
          const A b = norm[map_offset(args.pixel_of, first + i, p.pixels, group, p.groups)];
          const Vector<A, 2> v = output_position<M, G>(args, constants, b);
          inverse_b[i] = v.at[0];
          b_or_h[i] = v.at[1];
        }
        __syncthreads();
        if (place.own >= count)
          continue;
        OutputPositions<Each<A, V>> own;
        load_neighbours(inverse_b + place.own, own.inverse_b.at);
        load_neighbours(b_or_h + place.own, own.b_or_h.at);
        int64_t offset = place.base(args.pixel_of, tile) + (begin + lane.way) * p.pixels;
#pragma unroll 1
        for (int c = begin + lane.way; c < end; c += ways) {
          Vector<T, V> vector[1];
          stream.take(offset, vector);
          store_vector(
              y + offset,
              outputs_of<M, G>(
                  args, own_constants, table.of(c - begin), first_filter + c, 0, own, vector[0]
              )
          );
          stream.advance();
          offset += step;
        }
      }
    }
  }
}

template <class A>
EpilogueArgs epilogue_args(const EpilogueParams& p, int width) {
  const RowLanes lanes = p.channels_last ? row_lanes(p.o, p.groups, width) : RowLanes{};
  return {
      p,
      lanes,
      plane_lanes(p.o / p.groups),
      PixelOf(p.positions / p.pixels, static_cast<int>(p.pixels), 1),
      p.channels_last ? tile_turns<A>(lanes, kEpilogueTurns) : 0,
      h_per_position(Magnitudes{}, p.op, p.filters)
  };
}

template <class T, class M, class G, int V>
void launch_epilogue_channels_last(const EpilogueParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const EpilogueArgs args = epilogue_args<A>(p, V);
  const RowLanes& lanes = args.row_lanes;
  launch(
      "epilogue_channels_last",
      epilogue_channels_last_kernel<T, M, G, V>,
      Grid{persistent_blocks(
          ceil_div(p.positions, lanes.rows), lanes.threads, kEpilogueBlocks<M> * lanes.threads
      )},
      lanes.threads,
      SharedBytes()
          .take<unsigned char>(VectorRing<T, V, 1, kEpilogueSlots>::kBytes)
          .template take<Vector<A, 2>>(int64_t(2) * lanes.rows * args.turns * lanes.chunk_groups)
          .total(),
      stream,
      args
  );
}

template <class T, class M, class G, int V>
void launch_epilogue_contiguous(const EpilogueParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const EpilogueArgs args = epilogue_args<A>(p, V);
  const int64_t tile_positions = int64_t(kWarp) * V * args.plane_lanes.tiles;
  SharedBytes bytes;
  bytes.take<unsigned char>(VectorRing<T, V, 1, kEpilogueSlots>::kBytes);
  FilterTable<A>::take(bytes);
  bytes.take<A>(2 * tile_positions).template take<A>(2 * tile_positions);
  launch(
      "epilogue_contiguous",
      epilogue_contiguous_kernel<T, M, G, V>,
      Grid{
          persistent_blocks(
              ceil_div(p.positions, tile_positions), kThreads, kEpilogueBlocks<M> * kThreads
          ),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      bytes.total(),
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

// Channels last, other functions: an instantiation per angular function.
template <class T, class... G>
void epilogue_by_angular(TypeList<G...>, const EpilogueParams& p, Stream stream) {
  static constexpr void (*table[])(const EpilogueParams&, Stream) = {
      launch_epilogue_channels_last<T, AnyMagnitude, G, kWide<T>>...
  };
  table[p.op.angular](p, stream);
}

template <class T>
void epilogue_typed(const EpilogueParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  if (p.positions == 0)
    return;
  if (!takes_wide_vectors<T>(p.channels_last, p.o / p.groups, p.pixels, {p.u, p.y})) {
    const auto run = p.channels_last ? launch_epilogue_channels_last<T, AnyMagnitude, AnyAngular, 1>
                                     : launch_epilogue_contiguous<T, AnyMagnitude, AnyAngular, 1>;
    return run(p, stream);
  }
  if constexpr (std::is_same<T, double>::value) {
    const auto run = p.channels_last
                         ? launch_epilogue_channels_last<T, AnyMagnitude, AnyAngular, kV>
                         : launch_epilogue_contiguous<T, AnyMagnitude, AnyAngular, kV>;
    run(p, stream);
  } else {
    const bool per_position = h_per_position(Magnitudes{}, p.op, p.filters);
    const bool known = with_known_functions(p.op, per_position, [&](auto m, auto g) {
      using M = decltype(m);
      using G = decltype(g);
      const auto run = p.channels_last ? launch_epilogue_channels_last<T, M, G, kV>
                                       : launch_epilogue_contiguous<T, M, G, kV>;
      run(p, stream);
    });
    if (known)
      return;
    if (p.channels_last)
      epilogue_by_angular<T>(Angulars{}, p, stream);
    else
      launch_epilogue_contiguous<T, AnyMagnitude, AnyAngular, kV>(p, stream);
  }
}

}  // namespace dcconv::cuda
