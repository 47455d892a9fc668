// x -> sum of squares over the channels of a group, per pixel.
#pragma once

#include "cuda/support/functions.cuh"
#include "cuda/support/lanes.cuh"

namespace dcconv::cuda {

struct PixelSumsqArgs {
  PixelSumsqParams p;
  int width;  // threads per sum, a power of two
  PlaneLanes lanes;
};

// Channels last: x is [n pixels groups, c / groups], one sum per row by `width` threads.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) pixel_sumsq_channels_last_kernel(PixelSumsqArgs args) {
  using A = typename ComputeType<T>::type;
  const PixelSumsqParams& p = args.p;
  const int channels = p.c / p.groups, vectors = channels / V;
  const int64_t rows = p.n * p.pixels * p.groups;
  const int sums_at_once = kThreads / args.width;
  const int slot = static_cast<int>(threadIdx.x) / args.width;
  const int lane = static_cast<int>(threadIdx.x) - slot * args.width;
  const T* x = static_cast<const T*>(p.x);
  A* sums = static_cast<A*>(p.sums);
  const int64_t step = int64_t(gridDim.x) * sums_at_once;
  for (int64_t first = int64_t(blockIdx.x) * sums_at_once; first < rows; first += step) {
    const int64_t row = first + slot;
    A total = 0;
    if (row < rows) {
      const T* v = x + row * channels;
#pragma unroll 4
      for (int i = lane; i < vectors; i += args.width) {
        const Vector<T, V> loaded = load_vector<T, V>(v + i * V);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A value = load(loaded.at[j]);
          total += value * value;
        }
      }
    }
    total = sub_warp_sum(total, args.width);
    if (row < rows && lane == 0)
      sums[row] = total;
  }
}

// Contiguous: every thread sums V neighbouring pixels over its share of the channels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) pixel_sumsq_contiguous_kernel(PixelSumsqArgs args) {
  using A = typename ComputeType<T>::type;
  const PixelSumsqParams& p = args.p;
  const PlaneLane lane(args.lanes);
  const int channels = p.c / p.groups;
  const int64_t positions = p.n * p.pixels;
  const int span = kWarp * V;
  SharedMemory shared;
  A* partial = shared.take<A>(kThreads * V);
  const T* x = static_cast<const T*>(p.x);
  A* sums = static_cast<A*>(p.sums);
  const int64_t tile_positions = int64_t(span) * args.lanes.tiles;
  const int64_t tiles = (positions + tile_positions - 1) / tile_positions;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t position = tile * tile_positions + lane.tile * span + lane.lane * V;
      const bool inside = position < positions;
      const int64_t image = inside ? position / p.pixels : 0;
      const int64_t pixel = position - image * p.pixels;
      A total[V] = {};
      if (inside) {
        const T* v = x + (image * p.c + int64_t(group) * channels) * p.pixels + pixel;
#pragma unroll 2
        for (int c = lane.way; c < channels; c += args.lanes.ways) {
          const Vector<T, V> loaded = load_vector<T, V>(v + c * p.pixels);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A value = load(loaded.at[j]);
            total[j] += value * value;
          }
        }
      }
      // partial [tiles, ways, span]
      A* own = partial + (lane.tile * args.lanes.ways + lane.way) * span + lane.lane * V;
#pragma unroll
      for (int j = 0; j < V; ++j)
        own[j] = total[j];
      __syncthreads();
      if (inside && lane.way == 0) {
        A* out = sums + (image * p.groups + group) * p.pixels + pixel;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          A sum = own[j];
          for (int way = 1; way < args.lanes.ways; ++way)
            sum += own[way * span + j];
          out[j] = sum;
        }
      }
      __syncthreads();
    }
  }
}

template <class T, int V>
void launch_pixel_sumsq(const PixelSumsqParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int channels = p.c / p.groups;
  const int64_t positions = p.n * p.pixels;
  PixelSumsqArgs args{p, 1, plane_lanes(channels)};
  if (p.channels_last) {
    args.width = power_of_two_at_least(channels / V, kWarp);
    const int64_t tasks = ceil_div(positions * p.groups, kThreads / args.width);
    launch(
        "pixel_sumsq_channels_last",
        pixel_sumsq_channels_last_kernel<T, V>,
        Grid{positions == 0 ? 0 : persistent_blocks(tasks, kThreads, 2048)},
        kThreads,
        0,
        stream,
        args
    );
    return;
  }
  const int64_t tiles = ceil_div(positions, int64_t(kWarp) * V * args.lanes.tiles);
  launch(
      "pixel_sumsq_contiguous",
      pixel_sumsq_contiguous_kernel<T, V>,
      Grid{
          tiles == 0 ? 0 : persistent_blocks(tiles, kThreads, 2048),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      SharedBytes().take<A>(kThreads * V).total(),
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
