// Depthwise and small groups: x and w -> u, b and y in one pass over x and y, no tensor cores.
#pragma once

#include "check.h"

#include "cuda/fused/strip.cuh"

namespace dcconv::cuda {

struct DepthwiseArgs {
  FusedParams p;
  StripGeometry geometry;
  StripLanes lanes;
};

// Threads per multiprocessor that the registers allow.
constexpr int kDepthwiseResident = 2 * kThreads;

// K: of strip_sums. V > 1: one channel and one filter per group.
template <class T, int V, int K>
__global__ void __launch_bounds__(kThreads, 2) depthwise_channels_last_kernel(DepthwiseArgs args) {
  using A = typename ComputeType<T>::type;
  const FusedParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripLanes& lanes = args.lanes;
  const int row = static_cast<int>(threadIdx.x) / lanes.columns;
  const int column = static_cast<int>(threadIdx.x) - row * lanes.columns;
  const int channels = p.c / p.groups, per_group = p.o / p.groups;
  const int taps = g.along.kernel * g.across.kernel, width = lanes.columns * V;
  const int chunk = static_cast<int>(blockIdx.y) * width;
  const int filter = chunk + column * V, group = V > 1 ? filter : filter / per_group;
  const Constants<A> constants = constants_of<A>(p.op);
  SharedMemory shared;
  A* weights = shared.take<A>(channels * taps * width);  // [c / groups, r s, filters]
  A* staged = shared.take<A>(3 * width);  // of Filters: registers are short in the loop
  for (int i = static_cast<int>(threadIdx.x); i < channels * taps * width; i += lanes.threads) {
    const int tap = i / width, o = chunk + i - tap * width, c = V > 1 ? 0 : tap / taps;
    weights[i] = o < p.o ? load(
                               static_cast<const T*>(
                                   p.weight
                               )[weight_offset(o, c, tap - c * taps, channels, taps, true)]
                           )
                         : A(0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < width; i += lanes.threads) {
    if (chunk + i >= p.o)
      continue;
    Filters<Each<A, 1>> one;
    load_filters<T>(p.filters, nullptr, chunk + i, one);
    staged[i] = one.inverse_a[0];
    staged[width + i] = one.rho[0];
    staged[2 * width + i] = one.inverse_rho[0];
  }
  __syncthreads();
  if (row >= lanes.rows || filter >= p.o)
    return;
  const int64_t begin = int64_t(blockIdx.x) * lanes.block_strips;
  const int64_t end = at_most(begin + lanes.block_strips, lanes.strips);
#pragma unroll 1
  for (int64_t strip = begin + row; strip < end; strip += lanes.rows) {
    const Pixel at = lanes.strip_of(strip);
    const int along = at.x * kStrip;
    A dot[kStrip][V] = {}, sum[kStrip][V] = {};
    const T* image = static_cast<const T*>(p.x) + at.image * g.in.across * g.across.input +
                     int64_t(group) * channels;
#pragma unroll 1
    for (int c = 0; c < channels; ++c) {
      strip_sums<K>(
          g,
          image + c,
          at.y,
          along,
          !p.map_is_norm,
          [&](int tap, A(&w)[V]) {
            load_values(weights + (c * taps + tap) * width + column * V, w);
          },
          dot,
          sum
      );
    }
    Filters<Each<A, V>> filters;
    load_values(staged + column * V, filters.inverse_a.at);
    load_values(staged + width + column * V, filters.rho.at);
    load_values(staged + 2 * width + column * V, filters.inverse_rho.at);
    const int64_t position = (at.image * g.across.output + at.y) * g.along.output + along;
    const int count = at_most(kStrip, g.along.output - along);
#pragma unroll 1
    for (int q = 0; q < count; ++q) {
      finish_position<T, A, V>(
          p,
          constants,
          filters,
          filter,
          dot[0],
          sum[0],
          (position + q) * p.o + filter,
          (position + q) * p.groups + group,
          V > 1 || filter == group * per_group
      );
      next_position(dot);
      next_position(sum);
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, 3) depthwise_contiguous_kernel(DepthwiseArgs args) {
  using A = typename ComputeType<T>::type;
  const FusedParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripLanes& lanes = args.lanes;
  const int channels = p.c / p.groups, per_group = p.o / p.groups;
  const int taps = g.along.kernel * g.across.kernel;
  const Constants<A> constants = constants_of<A>(p.op);
  const int64_t inputs = int64_t(g.along.input) * g.across.input;
  const int64_t outputs = int64_t(g.along.output) * g.across.output;
  const int64_t step = int64_t(gridDim.x) * kThreads;
#pragma unroll 1
  for (int64_t strip = int64_t(blockIdx.x) * kThreads + threadIdx.x; strip < lanes.strips;
       strip += step) {
    const Pixel at = lanes.strip_of(strip);
    const Pixel plane = lanes.channel_of(at.image);
    const int filter = plane.y, group = filter / per_group, along = at.y * kStrip;
    A dot[kStrip][1] = {}, sum[kStrip][1] = {};
#pragma unroll 1
    for (int c = 0; c < channels; ++c) {
      const int64_t channel = plane.image * p.c + int64_t(group) * channels + c;
      const T* w = static_cast<const T*>(p.weight) + (int64_t(filter) * channels + c) * taps;
      strip_sums<K>(
          g,
          static_cast<const T*>(p.x) + channel * inputs,
          at.x,
          along,
          !p.map_is_norm,
          [&](int tap, A(&value)[1]) { value[0] = load(w[tap]); },
          dot,
          sum
      );
    }
    Filters<Each<A, 1>> filters;
    load_filters<T>(p.filters, nullptr, filter, filters);
    const int count = at_most(kStrip, g.along.output - along);
#pragma unroll 1
    for (int q = 0; q < count; ++q) {
      const int64_t pixel = int64_t(along + q) * g.out.along + at.x;
      finish_position<T, A, 1>(
          p,
          constants,
          filters,
          filter,
          dot[0],
          sum[0],
          at.image * outputs + pixel,
          (plane.image * p.groups + group) * outputs + pixel,
          filter == group * per_group
      );
      next_position(dot);
      next_position(sum);
    }
  }
}

// Shared memory for the weights of `width` channels and for their Filters.
template <class A>
std::size_t direct_shared(int64_t values_per_channel, int64_t width) {
  return SharedBytes().take<A>(values_per_channel * width).template take<A>(3 * width).total();
}

inline void check_direct(int columns, int64_t values) {
  DCCONV_CHECK(
      columns > 0, "a depthwise filter must fit in shared memory, got ", values, " values"
  );
}

// Vectors side by side of which the weights fit in shared memory, 0 if not even one does.
template <class A>
int direct_columns(int64_t values_per_channel, int vector) {
  int columns = kDirectColumns * (vector > 1 ? 1 : kDirectVector);
  while (columns > 0 && direct_shared<A>(values_per_channel, columns * vector) > kSharedLimit)
    columns /= 2;
  return columns;
}

template <class T, int V, int K>
void launch_depthwise_channels_last(const FusedParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int64_t values = int64_t(p.window.rows.kernel) * p.window.columns.kernel * p.c / p.groups;
  const int columns = direct_columns<A>(values, V);
  if constexpr (V > 1) {
    if (columns == 0)
      return launch_depthwise_channels_last<T, 1, 0>(p, stream);
  }
  check_direct(columns, values);
  DepthwiseArgs args{
      p,
      strip_geometry(p.window, true, p.c, p.o, p.groups),
      strip_lanes(p.n, p.o, p.window.rows.output, p.window.columns.output, true, V, columns)
  };
  const Grid grid = strip_grid(args.lanes, true, kDepthwiseResident);
  launch(
      "depthwise_channels_last",
      depthwise_channels_last_kernel<T, V, K>,
      grid,
      args.lanes.threads,
      direct_shared<A>(values, int64_t(args.lanes.columns) * V),
      stream,
      args
  );
}

template <class T, int K>
void launch_depthwise_contiguous(const FusedParams& p, Stream stream) {
  DepthwiseArgs args{
      p,
      strip_geometry(p.window, false, p.c, p.o, p.groups),
      strip_lanes(p.n, p.o, p.window.rows.output, p.window.columns.output, false, 1, 1)
  };
  const Grid grid = strip_grid(args.lanes, false, kDepthwiseResident);
  launch(
      "depthwise_contiguous", depthwise_contiguous_kernel<T, K>, grid, kThreads, 0, stream, args
  );
}

// K of an undilated K x K window at stride 1, padded with zeros, else 0.
inline int plain_kernel(const Window& w) {
  const bool plain = w.rows.kernel == w.columns.kernel && w.rows.stride == 1 &&
                     w.columns.stride == 1 && w.rows.dilation == 1 && w.columns.dilation == 1 &&
                     w.rows.mode == PaddingMode::zeros;
  return plain ? w.rows.kernel : 0;
}

// Whether vectors of channels work: each channel is a group and a filter, 16-byte accesses.
inline bool
takes_channel_vectors(int c, int o, int groups, std::initializer_list<const void*> all) {
  bool takes = groups == c && o == c && c % kDirectVector == 0;
  for (const void* p : all)
    takes = takes && aligned16(p);
  return takes;
}

template <class T>
void depthwise_typed(const FusedParams& p, Stream stream) {
  constexpr bool kDouble = std::is_same<T, double>::value;
  const bool vectors = takes_channel_vectors(p.c, p.o, p.groups, {p.x, p.y, p.dot, p.map, p.norm});
  auto run =
      p.channels_last ? launch_depthwise_channels_last<T, 1, 0> : launch_depthwise_contiguous<T, 0>;
  if constexpr (!kDouble) {
    constexpr int kV = kDirectVector;
    const int kernel = plain_kernel(p.window);
    if (p.channels_last && vectors) {
      run = kernel == 3   ? launch_depthwise_channels_last<T, kV, 3>
            : kernel == 5 ? launch_depthwise_channels_last<T, kV, 5>
            : kernel == 7 ? launch_depthwise_channels_last<T, kV, 7>
                          : launch_depthwise_channels_last<T, kV, 0>;
    } else if (!p.channels_last && kernel == 3) {
      run = launch_depthwise_contiguous<T, 3>;
    }
  }
  run(p, stream);
}

}  // namespace dcconv::cuda
