// x -> y = max(0, x scale[c] + shift[c]), and the sums of squares of y over the channels of a
// group, per pixel: pixel_sumsq's walk through x, with a store beside every load.
#pragma once

#include "cuda/passes/pixel_sumsq.cuh"

namespace dcconv::cuda {

struct AffineReluArgs {
  AffineReluParams p;
  int width;  // threads per row, a power of two
  PlaneLanes lanes;
  PixelOf pixel_of;  // contiguous: of positions
  PixelOf group_of;  // channels last: of rows, groups in the place of pixels
};

// Where a thread of the channels-last kernel has the scale and shift of its channels from: its
// rows are one vector long, and it keeps them; all rows have the same; rows are of several groups.
enum class Channels { kept, shared, grouped };

// Channels whose vectors a thread of the contiguous kernel loads side by side: of single elements
// eight have more addresses than there are registers. Sums keep the order of pixel_sumsq.
constexpr int kAffinePlanesAtOnce = 4;

// Product and sum are rounded once whatever a compiler contracts: y is rounded again, and where
// that goes the other way the sums show it.
__device__ __forceinline__ float affine_relu_of(float x, float scale, float shift) {
  return at_least(::fmaf(x, scale, shift), 0.0f);
}
__device__ __forceinline__ double affine_relu_of(double x, double scale, double shift) {
  return at_least(::fma(x, scale, shift), 0.0);
}

// Scale and shift of V neighbouring channels.
template <class A, int V>
struct ChannelMap {
  A scale[V], shift[V];

  __device__ __forceinline__ void load(const AffineReluParams& p, int channel) {
    load_neighbours<A, V>(static_cast<const A*>(p.scale) + channel, scale);
    load_neighbours<A, V>(static_cast<const A*>(p.shift) + channel, shift);
  }

  template <class T>
  __device__ __forceinline__ Vector<T, V> operator()(const Vector<T, V>& x) const {
    A values[V];
    unpack(x, values);
#pragma unroll
    for (int j = 0; j < V; ++j)
      values[j] = affine_relu_of(values[j], scale[j], shift[j]);
    return pack<T, V>(values);
  }
};

// Channels last: x is [n pixels groups, c / groups].
template <class T, int V, int R, Channels kChannels>
__global__ void
__launch_bounds__(kThreads, kRowSumsBlocks) affine_relu_channels_last_kernel(AffineReluArgs args) {
  using A = typename ComputeType<T>::type;
  const AffineReluParams& p = args.p;
  const int channels = p.c / p.groups, vectors = channels / V, width = args.width;
  SubWarps<R> at(width, p.n * p.pixels * p.groups);
  const T* x = static_cast<const T*>(p.x) + at.member * V;
  T* y = static_cast<T*>(p.y) + at.member * V;
  ChannelMap<A, V> map;
  if constexpr (kChannels == Channels::kept) {
    if (at.member < vectors)
      map.load(p, at.member * V);
  }
  const int64_t distance = int64_t(at.slots) * channels;
  for (; at.first < at.rows; at.first += at.step) {
    const int64_t row = at.row(0);
    // Row r is there where r slots < left.
    const int left = static_cast<int>(at_most(at.rows - row, int64_t(R) * at.slots));
    int64_t offset = row * channels;
    int first_channel[R] = {};
    if constexpr (kChannels == Channels::grouped) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t position = args.group_of.image(at.read(r));
        first_channel[r] = static_cast<int>(at.read(r) - position * p.groups) * channels;
      }
    }
    A totals[R] = {};
#pragma unroll 1
    for (int i = at.member; i < vectors; i += width, offset += width * V) {
      Vector<T, V> loaded[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r * at.slots < left)
          loaded[r] = load_vector<T, V>(x + offset + r * distance);
      }
      if constexpr (kChannels == Channels::shared)
        map.load(p, i * V);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r * at.slots < left) {
          if constexpr (kChannels == Channels::grouped)
            map.load(p, first_channel[r] + i * V);
          const Vector<T, V> value = map(loaded[r]);
          store_vector(y + offset + r * distance, value);
          totals[r] = add_squares(totals[r], value);
        }
      }
    }
    at.store_sums(totals, static_cast<A*>(p.sums));
  }
}

// Contiguous: every thread takes V neighbouring pixels of its share of the channels.
template <class T, int V>
__global__ void
__launch_bounds__(kThreads, kPlaneSumsBlocks) affine_relu_contiguous_kernel(AffineReluArgs args) {
  using A = typename ComputeType<T>::type;
  using Shares = PlaneShares<A, V>;
  const AffineReluParams& p = args.p;
  const PlaneLane lane(args.lanes);
  const int channels = p.c / p.groups, ways = args.lanes.ways;
  const int64_t positions = p.n * p.pixels;
  const int tile_positions = Shares::kSpan * args.lanes.tiles;
  SharedMemory shared;
  const Shares shares{shared.take<A>(Shares::kCount), args.lanes};
  const PlanePlace place{
      p.pixels, p.c, positions, tile_positions, lane.tile * Shares::kSpan + lane.lane * V
  };
  const int64_t tiles = (positions + tile_positions - 1) / tile_positions;
  const int64_t step = ways * p.pixels;
  constexpr int kAtOnce = kAffinePlanesAtOnce;
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const int first_channel = group * channels + lane.way;
    const T* x = static_cast<const T*>(p.x) + first_channel * p.pixels;
    T* y = static_cast<T*>(p.y) + first_channel * p.pixels;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_positions, base = place.base(args.pixel_of, tile);
      A total[V] = {};
      if (base >= 0) {
        int64_t offset = base;
        const A* scale = static_cast<const A*>(p.scale) + first_channel;
        const A* shift = static_cast<const A*>(p.shift) + first_channel;
#pragma unroll 1
        for (int left = (channels - lane.way + ways - 1) / ways; left > 0; left -= kAtOnce) {
          Vector<T, V> loaded[kAtOnce];
          A factor[kAtOnce], addend[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (k < left) {
              loaded[k] = load_vector<T, V>(x + offset + k * step);
              factor[k] = scale[k * ways];
              addend[k] = shift[k * ways];
            }
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (k < left) {
              A values[V];
              unpack(loaded[k], values);
#pragma unroll
              for (int j = 0; j < V; ++j)
                values[j] = affine_relu_of(values[j], factor[k], addend[k]);
              const Vector<T, V> value = pack<T, V>(values);
              store_vector(y + offset + k * step, value);
              unpack(value, values);
#pragma unroll
              for (int j = 0; j < V; ++j)
                total[j] += values[j] * values[j];
            }
          }
          offset += kAtOnce * step;
          scale += kAtOnce * ways;
          shift += kAtOnce * ways;
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

template <class T, int V, int R, Channels kChannels>
void launch_affine_rows(const AffineReluArgs& args, int64_t tasks, Stream stream) {
  launch(
      "affine_relu_channels_last",
      affine_relu_channels_last_kernel<T, V, R, kChannels>,
      Grid{tasks == 0 ? 0 : persistent_blocks(tasks, kThreads, kRowSumsBlocks * kThreads)},
      kThreads,
      0,
      stream,
      args
  );
}

template <class T, int V, int R>
void launch_affine_rows_of(const AffineReluArgs& args, int64_t tasks, Stream stream) {
  // Small and unaligned problems have no kernel of their own for rows of one vector.
  constexpr Channels kOneVector = R > 1 && V > 1 ? Channels::kept : Channels::shared;
  if (args.p.groups > 1)
    launch_affine_rows<T, V, R, Channels::grouped>(args, tasks, stream);
  else if (args.p.c / V <= args.width)
    launch_affine_rows<T, V, R, kOneVector>(args, tasks, stream);
  else
    launch_affine_rows<T, V, R, Channels::shared>(args, tasks, stream);
}

template <class T, int V>
void launch_affine_relu(const AffineReluParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int channels = p.c / p.groups;
  const int64_t positions = p.n * p.pixels;
  AffineReluArgs args{p, 1, plane_lanes(ceil_div(channels, kPlanesAtOnce<V>)), {}, {}};
  if (p.channels_last) {
    args.width = threads_per_row(channels / V);
    args.group_of = PixelOf(positions, 1, p.groups);
    const int64_t rows = positions * p.groups, rows_at_once = kThreads / args.width;
    const int64_t tasks = ceil_div(rows, rows_at_once * kRowsAtOnce);
    if (tasks >= int64_t(2) * multiprocessors())
      launch_affine_rows_of<T, V, kRowsAtOnce>(args, tasks, stream);
    else
      launch_affine_rows_of<T, V, 1>(args, ceil_div(rows, rows_at_once), stream);
    return;
  }
  args.pixel_of = PixelOf(p.n, 1, static_cast<int>(p.pixels));
  const int64_t tiles = ceil_div(positions, int64_t(kWarp) * V * args.lanes.tiles);
  launch(
      "affine_relu_contiguous",
      affine_relu_contiguous_kernel<T, V>,
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
void affine_relu_typed(const AffineReluParams& p, Stream stream) {
  const int64_t run = p.channels_last ? p.c / p.groups : p.pixels;
  // Contiguous kernels read scale and shift one by one.
  const bool aligned = aligned16(p.x) && aligned16(p.y) &&
                       (!p.channels_last || (aligned16(p.scale) && aligned16(p.shift)));
  if (run % kWide<T> == 0 && aligned)
    launch_affine_relu<T, kWide<T>>(p, stream);
  else
    launch_affine_relu<T, 1>(p, stream);
}

}  // namespace dcconv::cuda
