// du, t and column sums in channels last. Terms of t lie in shared memory for a tile and are added
// up per row while the next tile is worked on.
#pragma once

#include "cuda/passes/grad_elements.cuh"
#include "cuda/passes/tiles.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

struct GradDotArgs {
  GradDotParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  PixelOf pixel_of;
  int turns;          // channels last: of a tile
  int sum_width;      // channels last: threads per row sum, a power of two
  bool per_position;  // h depends on the position alone, up to a factor a
  bool shared_sums;   // contiguous: whether column sums fit in shared memory
};

// Blocks of a multiprocessor that registers allow, by whether the functions are known.
template <class M>
constexpr int kGradBlocks = std::is_same<M, AnyMagnitude>::value ? 1 : 2;

// Shared memory of a block, at most: every GPU from sm_80 on gives a block 99 KiB.
constexpr std::size_t kGradShared = 96 << 10;

// Vectors of each tensor on their way: three of four slots.
constexpr int kGradSlots = 4;

// du of one vector; term and sums as in grad_elements.
template <
    class M,
    class G,
    Kept kKept,
    int kSums,
    class T,
    class E,
    class F,
    class P,
    int V,
    class A,
    int N>
__device__ __forceinline__ Vector<T, V> grads_of(
    const GradDotArgs& args,
    const Constants<E>& constants,
    const Filters<F>& filters,
    int64_t first,
    int step,
    const GradPositions<P>& positions,
    const Vector<T, V> (&vectors)[2],
    A (&term)[V],
    SumValues<A, N>& sums
) {
  A dy[V], kept[V], du[V];
  unpack(vectors[0], dy);
  unpack(vectors[1], kept);
  if constexpr (std::is_same<M, AnyMagnitude>::value) {
    chosen_grad_elements<G>(
        args.p,
        args.per_position,
        constants,
        filters,
        first,
        step,
        positions,
        dy,
        kept,
        du,
        term,
        sums
    );
  } else {
    grad_elements<M, G, kKept, kSums, E>(filters, positions, dy, kept, du, term, sums);
  }
  return pack<T, V>(du);
}

// A block's sum of a filter. There may be fewer blocks than rows of parts: the first row of those
// that remain, and so on, is theirs to clear.
template <class A>
__device__ __forceinline__ void
store_part(const GradDotParams& p, int64_t kind, int64_t filter, A total) {
  A* parts = static_cast<A*>(p.parts) + kind * p.rows * p.o + filter;
  parts[blockIdx.x * p.o] = total;
  for (int64_t row = blockIdx.x + gridDim.x; row < p.rows; row += gridDim.x)
    parts[row * p.o] = A(0);
}

// Terms of t in shared memory: [rows, pitch], odd, so that threads of different rows meet different
// banks.
__host__ __device__ __forceinline__ int term_pitch(const RowLanes& lanes) {
  return lanes.columns | 1;
}

template <int V>
__host__ __device__ __forceinline__ int grad_terms(const RowLanes& lanes, int turns) {
  const int terms = 2 * lanes.rows * turns * term_pitch(lanes);
  const int sums = lanes.rows * lanes.columns * V;
  return terms > sums ? terms : sums;
}

// t of a tile's rows and the chunk's groups from its terms, each by `sum_width` threads. A group
// that began in an earlier chunk has a sum already, from this block.
template <class A>
__device__ __forceinline__ void store_row_sums(
    const GradDotArgs& args,
    const ChunkPlace& place,
    int chunk,
    int width,
    int64_t first,
    int rows,
    const A* terms
) {
  const GradDotParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const int vectors = p.o / p.groups / width, last = place.end / width - chunk;
  const int slot = static_cast<int>(threadIdx.x) / args.sum_width;
  const int member = static_cast<int>(threadIdx.x) - slot * args.sum_width;
  A* t = static_cast<A*>(p.t) + first * p.groups;
  for (int start = 0; start < rows * place.groups; start += lanes.threads / args.sum_width) {
    const int i = start + slot;
    const int row = place.groups == 1 ? i : i / place.groups;
    const int group = place.first_group + i - row * place.groups;
    const bool inside = i < rows * place.groups;
    A total = 0;
    if (inside) {
      const int begin = at_least(group * vectors - chunk, 0);
      const int end = at_most((group + 1) * vectors - chunk, last);
      const A* own = terms + row * term_pitch(lanes);
      for (int j = begin + member; j < end; j += args.sum_width)
        total += own[j];
    }
    total = sub_warp_sum(total, args.sum_width);
    if (inside && member == 0) {
      A* out = t + int64_t(row) * p.groups + group;
      *out = group * vectors < chunk ? *out + total : total;
    }
  }
}

template <class T, class M, class G, Kept kKept, int kSums, int V>
__global__ void
__launch_bounds__(kThreads, kGradBlocks<M>) grad_dot_channels_last_kernel(GradDotArgs args) {
  using A = typename ComputeType<T>::type;
  using E = typename EvaluationType<T>::type;
  const GradDotParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const Constants<A> constants = constants_of<A>(p.op);
  const Constants<E> own_constants = constants_of<E>(p.op);
  const int tile_rows = lanes.rows * args.turns, tile_values = tile_rows * lanes.chunk_groups;
  const int pitch = term_pitch(lanes), tile_terms = tile_rows * pitch;
  SharedMemory shared;
  VectorRing<T, V, 2, kGradSlots> ring(shared);
  A* position_values = shared.take<A>(2 * 4 * tile_values);  // [halves, values, 4]
  // [halves, tile_terms]; for a moment the column sums of all threads, [rows, columns, V].
  A* all_terms = shared.take<A>(grad_terms<V>(lanes, args.turns));
  const RowRange range(p.positions, lanes);
  const int64_t step = int64_t(lanes.rows) * p.o;
  const A* norm = static_cast<const A*>(p.norm);
  int half = 0;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const ChunkPlace place(lanes, lane, chunk, V, p.o, p.o / p.groups);
    Filters<Each<A, V>> filters{};
    if (place.active)
      load_filters<T>(p.filters, nullptr, place.channel, filters);
    SumValues<A, V> sums{};
    const int64_t offset = (range.begin + lane.row) * p.o + place.channel;
    T* grad_u = static_cast<T*>(p.grad_u) + offset;
    RowStream<T, V, 2, kGradSlots> stream(
        ring,
        {static_cast<const T*>(p.grad_y), static_cast<const T*>(p.kept)},
        offset,
        step,
        place.active ? range.turns(lane.row, lanes) : 0
    );
    // One tile more than there are: the last one's terms are added up there.
    for (int64_t first = range.begin; first < range.end + tile_rows;
         first += tile_rows, half ^= 1) {
      const int rows =
          static_cast<int>(at_least(at_most(int64_t(tile_rows), range.end - first), int64_t(0)));
      A* values = position_values + half * 4 * tile_values;
      for (int i = static_cast<int>(threadIdx.x); i < rows * place.groups; i += lanes.threads) {
        const int row = place.groups == 1 ? i : i / place.groups;
        const int group = place.first_group + i - row * place.groups;
        A own[4];
        grad_position<M, G, kKept>(
            p, args.per_position, constants, norm[(first + row) * p.groups + group], own
        );
#pragma unroll
        for (int j = 0; j < 4; ++j)
          values[4 * i + j] = own[j];
      }
      __syncthreads();
      if (p.t != nullptr && first > range.begin) {
        const int before =
            static_cast<int>(at_most(int64_t(tile_rows), range.end - first + tile_rows));
        store_row_sums(
            args, place, chunk, V, first - tile_rows, before, all_terms + (half ^ 1) * tile_terms
        );
      }
      if (!place.active)
        continue;
      A* own_term = all_terms + half * tile_terms + lane.row * pitch + lane.column;
      const A* own = values + 4 * (lane.row * place.groups + place.own_group);
#pragma unroll 1
      for (int row = lane.row; row < rows; row += lanes.rows) {
        Vector<T, V> vectors[2];
        stream.take(vectors);
        const GradPositions<Uniform<A>> position{{own[0]}, {own[1]}, {own[2]}, {own[3]}};
        A term[V];
        store_vector(
            grad_u,
            grads_of<M, G, kKept, kSums>(
                args, own_constants, filters, place.channel, 1, position, vectors, term, sums
            )
        );
        A total = term[0];
#pragma unroll
        for (int j = 1; j < V; ++j)
          total += term[j];
        if constexpr (std::is_same<M, AnyMagnitude>::value)
          total *= own[0] * own[0];
        else if constexpr (!std::is_same<M, PerPosition>::value)
          total *= own[3];
        *own_term = total;
        stream.advance();
        own += 4 * lanes.rows * place.groups;
        own_term += lanes.rows * pitch;
        grad_u += step;
      }
    }
    if constexpr (kSums != 0) {
      A* columns = all_terms;
      __syncthreads();
      each_sum<kSums>(sums, [&](int bit, const A(&own)[V]) {
        if ((p.sums & bit) == 0)
          return;
        if (place.active) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            columns[(lane.row * lanes.columns + lane.column) * V + j] =
                own[j] * radius_factor<M, kKept>(constants.alpha, filters.inverse_rho[j]);
        }
        __syncthreads();
        const int wanted = sum_row(p.sums, bit);
        for (int c = static_cast<int>(threadIdx.x); c < place.end - chunk * V; c += lanes.threads) {
          A total = 0;
          for (int row = 0; row < lanes.rows; ++row)
            total += columns[row * lanes.columns * V + c];
          store_part(p, wanted, chunk * V + c, total);
        }
        __syncthreads();
      });
    }
  }
}

}  // namespace dcconv::cuda
