// du, t and column sums of contiguous tensors. Warps that share the channels of a tile's positions
// add up their parts of t while the next tile is worked on.
#pragma once

#include "cuda/passes/grad_dot_channels_last.cuh"

namespace dcconv::cuda {

template <class T, class M, class G, Kept kKept, int kSums, int V>
__global__ void
__launch_bounds__(kThreads, kGradBlocks<M>) grad_dot_contiguous_kernel(GradDotArgs args) {
  using A = typename ComputeType<T>::type;
  using E = typename EvaluationType<T>::type;
  const GradDotParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways, side_by_side = args.plane_lanes.tiles;
  const Constants<A> constants = constants_of<A>(p.op);
  const Constants<E> own_constants = constants_of<E>(p.op);
  const int span = kWarp * V, tile_positions = span * side_by_side;
  const int per_group = p.o / p.groups, kinds = sum_kinds(p.sums);
  SharedMemory shared;
  VectorRing<T, V, 2, kGradSlots> ring(shared);
  FilterTable<A> table(shared);
  A* position_values = shared.take<A>(2 * 4 * tile_positions);  // [halves, 4, tile_positions]
  A* all_partial = shared.take<A>(2 * kThreads * V);            // [halves, tiles, ways, span]
  // Column sums of the group, [tiles, kinds, per_group]; each has one thread that adds to it.
  A* columns = nullptr;
  if (kSums != 0 && args.shared_sums)
    columns = shared.take<A>(side_by_side * kinds * per_group);
  const Share tiles((p.positions + tile_positions - 1) / tile_positions);
  const PlanePlace place{
      p.pixels, p.o, p.positions, tile_positions, lane.tile * span + lane.lane * V
  };
  const A* norm = static_cast<const A*>(p.norm);
  const int64_t step = ways * p.pixels;
  const auto map_at = [&](int64_t position, int group) {
    return map_offset(args.pixel_of, position, p.pixels, group, p.groups);
  };
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const int64_t first_filter = int64_t(group) * per_group;
    const int64_t first_plane = first_filter * p.pixels;
    // Without room in shared memory the sums grow in the block's own row of parts.
    A* own_columns = columns + lane.tile * kinds * per_group;
    int64_t kind_step = per_group;
    if (!args.shared_sums) {
      own_columns = static_cast<A*>(p.parts) + blockIdx.x * p.o + first_filter;
      kind_step = p.rows * p.o;
    }
    if constexpr (kSums != 0) {
      if (lane.lane == 0) {
        for (int bit = 1; bit <= kAllSums; bit *= 2)
          for (int c = lane.way; (p.sums & bit) != 0 && c < per_group; c += ways)
            own_columns[sum_row(p.sums, bit) * kind_step + c] = A(0);
      }
    }
    for (int begin = 0; begin < per_group; begin += FilterTable<A>::kFilters) {
      const int end = at_most(begin + FilterTable<A>::kFilters, per_group);
      table.template fill<T>(p.filters, nullptr, first_filter + begin, end - begin);
      PlaneStream<T, V, 2, kGradSlots> stream(
          ring,
          {static_cast<const T*>(p.grad_y) + first_plane,
           static_cast<const T*>(p.kept) + first_plane},
          place,
          args.pixel_of,
          tiles,
          begin + lane.way,
          end,
          ways
      );
      // One tile more than there are: the last one's parts of t are added up there.
      for (int64_t tile = tiles.begin; tile <= tiles.end; ++tile, half ^= 1) {
        const int64_t first = tile * tile_positions;
        const int count =
            tile == tiles.end
                ? 0
                : static_cast<int>(at_most(int64_t(tile_positions), p.positions - first));
        A* values = position_values + half * 4 * tile_positions;
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
          A own[4];
          grad_position<M, G, kKept>(
              p, args.per_position, constants, norm[map_at(first + i, group)], own
          );
#pragma unroll
          for (int j = 0; j < 4; ++j)
            values[j * tile_positions + i] = own[j];
        }
        __syncthreads();
        A* partial = all_partial + half * kThreads * V;
        if (p.t != nullptr && tile > tiles.begin) {
          const A* parts = all_partial + (half ^ 1) * kThreads * V;
          const int64_t before = first - tile_positions;
          const int past = static_cast<int>(at_most(int64_t(tile_positions), p.positions - before));
          for (int i = static_cast<int>(threadIdx.x); i < past; i += kThreads) {
            const int other = i / span;
            const A* own = parts + other * ways * span + (i - other * span);
            A total = own[0];
            for (int way = 1; way < ways; ++way)
              total += own[way * span];
            A* t = static_cast<A*>(p.t) + map_at(before + i, group);
            *t = begin == 0 ? total : *t + total;
          }
        }
        // Lanes past the last position go along: sums per filter are taken over whole warps.
        if (lane.tile * span >= count)
          continue;
        const bool inside = place.own < count;
        GradPositions<Each<A, V>> own;
        load_neighbours(values + place.own, own.inverse_b.at);
        load_neighbours(values + tile_positions + place.own, own.b_or_h.at);
        load_neighbours(values + 2 * tile_positions + place.own, own.d.at);
        load_neighbours(values + 3 * tile_positions + place.own, own.h_rho.at);
        A row_sum[V] = {};
        int64_t offset = place.base(args.pixel_of, tile) + (begin + lane.way) * p.pixels;
        T* grad_u = static_cast<T*>(p.grad_u) + first_plane + offset;
#pragma unroll 1
        for (int c = begin + lane.way; c < end; c += ways) {
          // What a lane past the last position takes from the ring is nobody's, and goes nowhere.
          Vector<T, V> vectors[2];
          if (inside || VectorRing<T, V, 2, kGradSlots>::kAsync)
            stream.take(offset, vectors);
          A term[V];
          SumValues<A, 1> sums{};
          const Filters<Uniform<A>> filters = table.of(c - begin);
          const Vector<T, V> du = grads_of<M, G, kKept, kSums>(
              args, own_constants, filters, first_filter + c, 0, own, vectors, term, sums
          );
          if (inside)
            store_vector(grad_u, du);
#pragma unroll
          for (int j = 0; j < V; ++j)
            row_sum[j] += term[j];
          if constexpr (kSums != 0) {
            each_sum<kSums>(sums, [&](int bit, const A(&all)[1]) {
              if ((p.sums & bit) == 0)
                return;
              const A total = sub_warp_sum(inside ? all[0] : A(0), kWarp);
              if (lane.lane == 0)
                own_columns[sum_row(p.sums, bit) * kind_step + c] +=
                    total * radius_factor<M, kKept>(constants.alpha, filters.inverse_rho[0]);
            });
          }
          stream.advance();
          offset += step;
          grad_u += step;
        }
        A* slot = partial + (lane.tile * ways + lane.way) * span + lane.lane * V;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          // From shared memory again: registers are short in the loop.
          const A* value = values + place.own + j;
          A total = row_sum[j];
          if constexpr (std::is_same<M, AnyMagnitude>::value)
            total *= value[0] * value[0];
          else if constexpr (!std::is_same<M, PerPosition>::value)
            total *= value[3 * tile_positions];
          slot[j] = total;
        }
      }
    }
    if (kSums != 0 && args.shared_sums) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kinds * per_group; i += kThreads) {
        A total = columns[i];
        for (int other = 1; other < side_by_side; ++other)
          total += columns[other * kinds * per_group + i];
        const int row = i / per_group;
        store_part(p, row, first_filter + (i - row * per_group), total);
      }
      __syncthreads();
    }
  }
}

}  // namespace dcconv::cuda
