// x -> sum of squares over the channels of a group, per pixel.
#pragma once

#include "cuda/passes/tiles.cuh"
#include "cuda/support/functions.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

struct PixelSumsqArgs {
  PixelSumsqParams p;
  int width;  // threads per sum, a power of two
  PlaneLanes lanes;
  PixelOf pixel_of;
};

// Blocks of a multiprocessor: what the registers are bounded to, and what is launched.
constexpr int kRowSumsBlocks = 3, kPlaneSumsBlocks = 3;

// Rows whose vectors a thread loads side by side; 1 where these are less than two blocks of a
// multiprocessor.
constexpr int kRowsAtOnce = 4;

// Channels whose vectors of V a thread loads side by side, and has at least where there are so
// many.
template <int V>
constexpr int kPlanesAtOnce = V == 1 ? 8 : 4;

template <class T, int V, class A>
__device__ __forceinline__ A add_squares(A total, const Vector<T, V>& v) {
  A values[V];
  unpack(v, values);
#pragma unroll
  for (int j = 0; j < V; ++j)
    total += values[j] * values[j];
  return total;
}

// Sums over sub-warps of `width` threads, of four values of each thread: thread `member` of a
// sub-warp returns that of value 2 (member & 1) + (member >> 1 & 1). Threads send half of their
// values instead of all: 4 shuffles of 4 values over 8 threads, not 12.
template <class A>
__device__ __forceinline__ A sums_of_four(const A (&values)[4], int member, int width) {
  const bool odd = (member & 1) != 0, upper = (member & 2) != 0;
  const A low =
      (odd ? values[2] : values[0]) + __shfl_xor_sync(kFullMask, odd ? values[0] : values[2], 1);
  const A high =
      (odd ? values[3] : values[1]) + __shfl_xor_sync(kFullMask, odd ? values[1] : values[3], 1);
  A total = (upper ? high : low) + __shfl_xor_sync(kFullMask, upper ? low : high, 2);
  for (int step = width / 2; step > 2; step /= 2)
    total += __shfl_xor_sync(kFullMask, total, step);
  return total;
}

// Sub-warps of `width` threads that take R rows at a time, every thread some vectors of each.
template <int R>
struct SubWarps {
  int width, slots, slot, member;
  int64_t rows, first, step;

  __device__ __forceinline__ SubWarps(int width, int64_t rows)
      : width(width), slots(kWarp / width), rows(rows) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) - warp * kWarp;
    slot = lane / width;
    member = lane - slot * width;
    first = (int64_t(blockIdx.x) * (kThreads / kWarp) + warp) * R * slots;
    step = int64_t(gridDim.x) * (kThreads / kWarp) * R * slots;
  }

  __device__ __forceinline__ int64_t row(int r) const { return first + r * slots + slot; }

  // Rows that are not there read the last one, and are not written.
  __device__ __forceinline__ int64_t read(int r) const { return at_most(row(r), rows - 1); }

  template <class A>
  __device__ __forceinline__ void store_sums(const A (&totals)[R], A* sums) const {
    if constexpr (R == 4) {
      if (width >= R) {
        const A total = sums_of_four(totals, member, width);
        const int64_t own = first + (2 * (member & 1) + (member >> 1)) * slots + slot;
        if (member < R && own < rows)
          sums[own] = total;
        return;
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const A total = sub_warp_sum(totals[r], width);
      if (member == 0 && row(r) < rows)
        sums[row(r)] = total;
    }
  }
};

// Channels last: x is [n pixels groups, c / groups].
template <class T, int V, int R>
__global__ void
__launch_bounds__(kThreads, kRowSumsBlocks) pixel_sumsq_channels_last_kernel(PixelSumsqArgs args) {
  using A = typename ComputeType<T>::type;
  const PixelSumsqParams& p = args.p;
  const int channels = p.c / p.groups, vectors = channels / V, width = args.width;
  SubWarps<R> at(width, p.n * p.pixels * p.groups);
  const T* x = static_cast<const T*>(p.x) + at.member * V;
  for (; at.first < at.rows; at.first += at.step) {
    const T* from[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      from[r] = x + at.read(r) * channels;
    A totals[R] = {};
#pragma unroll 1
    for (int i = at.member; i < vectors; i += width) {
      Vector<T, V> loaded[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        loaded[r] = load_vector<T, V>(from[r]);
        from[r] += width * V;
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
        totals[r] = add_squares(totals[r], loaded[r]);
    }
    at.store_sums(totals, static_cast<A*>(p.sums));
  }
}

// The sums of the threads that share the channels of V neighbouring pixels of a tile, added up by
// way of shared memory. Shares lie there in two halves that are written in turn: one barrier a
// tile.
template <class A, int V>
struct PlaneShares {
  A* partials;  // [halves, tiles, ways, span]
  PlaneLanes lanes;

  static constexpr int kSpan = kWarp * V, kCount = 2 * kThreads * V;

  // Sum i of `count` goes to store(i, sum).
  template <class Store>
  __device__ __forceinline__ void add_up(
      int half, const PlaneLane& lane, const A (&total)[V], int count, const Store& store
  ) const {
    const int ways = lanes.ways;
    A* shares = partials + half * kThreads * V;
    A* own = shares + (lane.tile * ways + lane.way) * kSpan + lane.lane * V;
#pragma unroll
    for (int j = 0; j < V; ++j)
      own[j] = total[j];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const A* share = shares + (i / kSpan * ways) * kSpan + i % kSpan;
      A sum = share[0];
      for (int way = 1; way < ways; ++way)
        sum += share[way * kSpan];
      store(i, sum);
    }
  }
};

// Contiguous: every thread sums V neighbouring pixels over its share of the channels.
template <class T, int V>
__global__ void
__launch_bounds__(kThreads, kPlaneSumsBlocks) pixel_sumsq_contiguous_kernel(PixelSumsqArgs args) {
  using A = typename ComputeType<T>::type;
  const PixelSumsqParams& p = args.p;
  const PlaneLane lane(args.lanes);
  const int channels = p.c / p.groups, ways = args.lanes.ways;
  const int64_t positions = p.n * p.pixels;
  using Shares = PlaneShares<A, V>;
  const int tile_positions = Shares::kSpan * args.lanes.tiles;
  SharedMemory shared;
  const Shares shares{shared.take<A>(Shares::kCount), args.lanes};
  const PlanePlace place{
      p.pixels, p.c, positions, tile_positions, lane.tile * Shares::kSpan + lane.lane * V
  };
  const int64_t tiles = (positions + tile_positions - 1) / tile_positions;
  const int64_t step = ways * p.pixels;
  constexpr int kAtOnce = kPlanesAtOnce<V>;
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const T* x = static_cast<const T*>(p.x) + (int64_t(group) * channels + lane.way) * p.pixels;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_positions, base = place.base(args.pixel_of, tile);
      A total[V] = {};
      if (base >= 0) {
        const T* from = x + base;
#pragma unroll 1
        for (int left = (channels - lane.way + ways - 1) / ways; left > 0;
             left -= kAtOnce, from += kAtOnce * step) {
          Vector<T, V> loaded[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (k < left)
              loaded[k] = load_vector<T, V>(from + k * step);
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (k < left) {
              A values[V];
              unpack(loaded[k], values);
#pragma unroll
              for (int j = 0; j < V; ++j)
                total[j] += values[j] * values[j];
            }
          }
        }
      }
      const int count = static_cast<int>(at_most(int64_t(tile_positions), positions - first));
      shares.add_up(half, lane, total, count, [&](int i, A sum) {
        A* out = static_cast<A*>(p.sums);
        out[map_offset(args.pixel_of, first + i, p.pixels, group, p.groups)] = sum;
      });
    }
  }
}

// Threads per row of so many vectors: a power of two that leaves at most an eighth of the threads
// idle; more than 8, which cover a line of 128 bytes, only where each has 4 vectors or more.
inline int threads_per_row(int vectors) {
  int best = 1;
  for (int width = 2; width <= kWarp && (width <= 8 || 4 * width <= vectors); width *= 2) {
    const int64_t idle = ceil_div(vectors, width) * width - vectors;
    if (8 * idle <= vectors)
      best = width;
  }
  return best;
}

template <class T, int V, int R>
void launch_row_sums(const PixelSumsqArgs& args, int64_t tasks, Stream stream) {
  launch(
      "pixel_sumsq_channels_last",
      pixel_sumsq_channels_last_kernel<T, V, R>,
      Grid{tasks == 0 ? 0 : persistent_blocks(tasks, kThreads, kRowSumsBlocks * kThreads)},
      kThreads,
      0,
      stream,
      args
  );
}

template <class T, int V>
void launch_pixel_sumsq(const PixelSumsqParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int channels = p.c / p.groups;
  const int64_t positions = p.n * p.pixels;
  PixelSumsqArgs args{p, 1, plane_lanes(ceil_div(channels, kPlanesAtOnce<V>)), {}};
  if (p.channels_last) {
    args.width = threads_per_row(channels / V);
    const int64_t rows = positions * p.groups, rows_at_once = kThreads / args.width;
    const int64_t tasks = ceil_div(rows, rows_at_once * kRowsAtOnce);
    if (tasks >= int64_t(2) * multiprocessors())
      launch_row_sums<T, V, kRowsAtOnce>(args, tasks, stream);
    else
      launch_row_sums<T, V, 1>(args, ceil_div(rows, rows_at_once), stream);
    return;
  }
  args.pixel_of = PixelOf(p.n, 1, static_cast<int>(p.pixels));
  const int64_t tiles = ceil_div(positions, int64_t(kWarp) * V * args.lanes.tiles);
  launch(
      "pixel_sumsq_contiguous",
      pixel_sumsq_contiguous_kernel<T, V>,
      Grid{
          tiles == 0 ? 0 : persistent_blocks(tiles, kThreads, kPlaneSumsBlocks * kThreads),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      SharedBytes().take<A>(PlaneShares<A, V>::kCount).total(),
      stream,
      args
  );
}

template <class T>
void pixel_sumsq_typed(const PixelSumsqParams& p, Stream stream) {
  const int64_t run = p.channels_last ? p.c / p.groups : p.pixels;
  if (run % kWide<T> == 0 && aligned16(p.x)) {
    launch_pixel_sumsq<T, kWide<T>>(p, stream);
  } else {
    launch_pixel_sumsq<T, 1>(p, stream);
  }
}

}  // namespace dcconv::cuda
