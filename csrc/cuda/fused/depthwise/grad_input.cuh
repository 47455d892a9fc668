// Depthwise and small groups: du, x and t -> dx = transposed convolution of du + x * (transposed
// window sum of t + sigma / b), in one pass.
#pragma once

#include <stdexcept>

#include "cuda/fused/depthwise/forward.cuh"

namespace dcconv::cuda {

struct DepthwiseGradInputArgs {
  FusedGradInputParams p;
  StripGeometry geometry;    // of the forward pass
  StripGeometry transposed;  // du as input, x as output: at stride 1 a convolution like any other
  StripLanes lanes;          // of strips of x
};

constexpr int kDepthwiseGradResident = 2 * kThreads;

// f(output index, tap index) for the windows along an axis that see input index i.
template <class F>
__device__ __forceinline__ void each_tap(const WindowAxis& axis, int i, F&& f) {
  Showing(axis, i).each([&](int padded) {
#pragma unroll 1
    for (int r = 0; r < axis.kernel; ++r) {
      const int start = padded - r * axis.dilation;
      if (start < 0)
        return;
      const int output = axis.stride == 1 ? start : start / axis.stride;
      if (output * axis.stride == start && output < axis.output)
        f(output, r);
    }
  });
}

// t + sigma / b of V elements of the map
template <class A, int V>
__device__ __forceinline__ void
tap_values(const FusedGradInputParams& p, A sigma, int64_t offset, A (&values)[V]) {
  load_values(static_cast<const A*>(p.t) + offset, values);
  if (p.tap == Tap::plain)
    return;
  A b[V];
  load_values(static_cast<const A*>(p.norm) + offset, b);
#pragma unroll
  for (int v = 0; v < V; ++v)
    values[v] += sigma / b[v];
}

// dx of a strip of x. K > 0: strip_sums on the transposed geometry, one filter per channel; K = 0:
// position by position. grad_u, map: of the image and the group; weight(filter of the group, tap,
// values).
template <int K, class T, class A, int V, class Weight>
__device__ __forceinline__ void grad_input_strip(
    const DepthwiseGradInputArgs& args,
    A sigma,
    const T* grad_u,
    int64_t map,
    int64_t filter_step,
    int filters,
    int across,
    int along,
    int64_t offset,
    Weight&& weight
) {
  const FusedGradInputParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripGeometry& t = args.transposed;
  const int count = at_most(kStrip, g.along.input - along);
  const auto store = [&](int q, const A(&dot)[V], const A(&sum)[V]) {
    const int64_t at = offset + q * g.in.along;
    A x[V];
    load_values(static_cast<const T*>(p.x) + at, x);
    Vector<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v)
      result.at[v] = Store<T>::from(dot[v] + x[v] * sum[v]);
    store_vector(static_cast<T*>(p.grad_x) + at, result);
  };
  if constexpr (K > 0) {
    A dot[kStrip][V] = {}, sum[kStrip][V] = {};
    strip_box<K>(
        t,
        across,
        along,
        [&](int i, int j, A(&values)[V]) {
          tap_values(p, sigma, map + i * g.map.across + j * g.map.along, values);
        },
        sum
    );
    strip_sums<K>(
        t,
        grad_u,
        across,
        along,
        false,
        [&](int tap, A(&w)[V]) { weight(0, K * K - 1 - tap, w); },
        dot,
        sum
    );
#pragma unroll 1
    for (int q = 0; q < count; ++q) {
      store(q, dot[0], sum[0]);
      next_position(dot);
      next_position(sum);
    }
  } else {
#pragma unroll 1
    for (int q = 0; q < count; ++q) {
      A dot[V] = {}, sum[V] = {};
      each_tap(g.across, across, [&](int i, int r) {
        each_tap(g.along, along + q, [&](int j, int s) {
          const int tap = static_cast<int>(r * g.tap.across + s * g.tap.along);
          A value[V];
          tap_values(p, sigma, map + i * g.map.across + j * g.map.along, value);
#pragma unroll
          for (int v = 0; v < V; ++v)
            sum[v] += value[v];
          const T* from = grad_u + i * g.out.across + j * g.out.along;
#pragma unroll 1
          for (int o = 0; o < filters; ++o) {
            A w[V];
            weight(o, tap, w);
            load_values(from + o * filter_step, value);
#pragma unroll
            for (int v = 0; v < V; ++v)
              dot[v] += w[v] * value[v];
          }
        });
      });
      store(q, dot, sum);
    }
  }
}

template <class T, int V, int K>
__global__ void __launch_bounds__(kThreads, 2) depthwise_grad_input_channels_last_kernel(
    DepthwiseGradInputArgs args
) {
  using A = typename ComputeType<T>::type;
  const FusedGradInputParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripLanes& lanes = args.lanes;
  const int row = static_cast<int>(threadIdx.x) / lanes.columns;
  const int column = static_cast<int>(threadIdx.x) - row * lanes.columns;
  const int channels = p.c / p.groups, per_group = p.o / p.groups;
  const int taps = g.along.kernel * g.across.kernel, width = lanes.columns * V;
  const int chunk = static_cast<int>(blockIdx.y) * width;
  const int channel = chunk + column * V, group = V > 1 ? channel : channel / channels;
  SharedMemory shared;
  A* weights = shared.take<A>(per_group * taps * width);  // [o / groups, r s, channels]
  for (int i = static_cast<int>(threadIdx.x); i < per_group * taps * width; i += lanes.threads) {
    const int row_of = i / width, c = chunk + i - row_of * width, o = row_of / taps;
    A value = 0;
    if (c < p.c) {
      const int g_of = c / channels;
      value = load(
          static_cast<const T*>(p.weight)[weight_offset(
              int64_t(g_of) * per_group + o,
              c - g_of * channels,
              row_of - o * taps,
              channels,
              taps,
              true
          )]
      );
    }
    weights[i] = value;
  }
  __syncthreads();
  if (row >= lanes.rows || channel >= p.c)
    return;
  const A sigma = p.tap == Tap::with_mean ? *static_cast<const A*>(p.sigma) : A(0);
  const int64_t begin = int64_t(blockIdx.x) * lanes.block_strips;
  const int64_t end = at_most(begin + lanes.block_strips, lanes.strips);
  const int64_t outputs = int64_t(g.along.output) * g.across.output;
#pragma unroll 1
  for (int64_t strip = begin + row; strip < end; strip += lanes.rows) {
    const Pixel at = lanes.strip_of(strip);
    const int along = at.x * kStrip;
    const int64_t position = (at.image * g.across.input + at.y) * g.along.input + along;
    grad_input_strip<K, T, A, V>(
        args,
        sigma,
        static_cast<const T*>(p.grad_u) + at.image * outputs * p.o + int64_t(group) * per_group,
        at.image * outputs * p.groups + group,
        1,
        per_group,
        at.y,
        along,
        position * p.c + channel,
        [&](int o, int tap, A(&w)[V]) {
          load_values(weights + (o * taps + tap) * width + column * V, w);
        }
    );
  }
}

template <class T, int K>
__global__ void
__launch_bounds__(kThreads, 2) depthwise_grad_input_contiguous_kernel(DepthwiseGradInputArgs args) {
  using A = typename ComputeType<T>::type;
  const FusedGradInputParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripLanes& lanes = args.lanes;
  const int channels = p.c / p.groups, per_group = p.o / p.groups;
  const int taps = g.along.kernel * g.across.kernel;
  const A sigma = p.tap == Tap::with_mean ? *static_cast<const A*>(p.sigma) : A(0);
  const int64_t inputs = int64_t(g.along.input) * g.across.input;
  const int64_t outputs = int64_t(g.along.output) * g.across.output;
  const int64_t step = int64_t(gridDim.x) * kThreads;
#pragma unroll 1
  for (int64_t strip = int64_t(blockIdx.x) * kThreads + threadIdx.x; strip < lanes.strips;
       strip += step) {
    const Pixel at = lanes.strip_of(strip);
    const Pixel plane = lanes.channel_of(at.image);
    const int channel = plane.y, group = channel / channels, c = channel - group * channels;
    const int along = at.y * kStrip;
    const int64_t filter = int64_t(group) * per_group;
    const T* w = static_cast<const T*>(p.weight) + (filter * channels + c) * taps;
    grad_input_strip<K, T, A, 1>(
        args,
        sigma,
        static_cast<const T*>(p.grad_u) + (plane.image * p.o + filter) * outputs,
        (plane.image * p.groups + group) * outputs,
        outputs,
        per_group,
        at.x,
        along,
        at.image * inputs + int64_t(along) * g.in.along + at.x,
        [&](int o, int tap, A(&value)[1]) {
          value[0] = load(w[int64_t(o) * channels * taps + tap]);
        }
    );
  }
}

// An axis on which x is made from du, at stride 1.
inline WindowAxis transposed_axis(const WindowAxis& axis) {
  WindowAxis t = axis;
  t.input = axis.output;
  t.output = axis.input;
  t.before = axis.dilation * (axis.kernel - 1) - axis.before;  // may be negative
  return t;
}

inline DepthwiseGradInputArgs
depthwise_grad_input_args(const FusedGradInputParams& p, int vector, int columns) {
  const StripGeometry g = strip_geometry(p.window, p.channels_last, p.c, p.o, p.groups);
  StripGeometry t = g;
  t.along = transposed_axis(g.along);
  t.across = transposed_axis(g.across);
  t.in = g.out;
  return {
      p,
      g,
      t,
      strip_lanes(
          p.n, p.c, p.window.rows.input, p.window.columns.input, p.channels_last, vector, columns
      )
  };
}

template <class T, int V, int K>
void launch_depthwise_grad_input_channels_last(const FusedGradInputParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int64_t values = int64_t(p.window.rows.kernel) * p.window.columns.kernel * p.o / p.groups;
  const int columns = direct_columns<A>(values, V);
  if constexpr (V > 1) {
    if (columns == 0)
      return launch_depthwise_grad_input_channels_last<T, 1, 0>(p, stream);
  }
  check_direct(columns, values);
  DepthwiseGradInputArgs args = depthwise_grad_input_args(p, V, columns);
  const Grid grid = strip_grid(args.lanes, true, kDepthwiseGradResident);
  launch(
      "depthwise_grad_input_channels_last",
      depthwise_grad_input_channels_last_kernel<T, V, K>,
      grid,
      args.lanes.threads,
      SharedBytes().take<A>(values * args.lanes.columns * V).total(),
      stream,
      args
  );
}

template <class T, int K>
void launch_depthwise_grad_input_contiguous(const FusedGradInputParams& p, Stream stream) {
  DepthwiseGradInputArgs args = depthwise_grad_input_args(p, 1, 1);
  const Grid grid = strip_grid(args.lanes, false, kDepthwiseGradResident);
  launch(
      "depthwise_grad_input_contiguous",
      depthwise_grad_input_contiguous_kernel<T, K>,
      grid,
      kThreads,
      0,
      stream,
      args
  );
}

template <class T>
void depthwise_grad_input_typed(const FusedGradInputParams& p, Stream stream) {
  constexpr bool kDouble = std::is_same<T, double>::value;
  auto run = p.channels_last ? launch_depthwise_grad_input_channels_last<T, 1, 0>
                             : launch_depthwise_grad_input_contiguous<T, 0>;
  if constexpr (!kDouble) {
    constexpr int kV = kDirectVector;
    const bool vectors =
        takes_channel_vectors(p.c, p.o, p.groups, {p.x, p.grad_u, p.t, p.norm, p.grad_x});
    const int kernel = p.o == p.groups && p.c == p.groups ? plain_kernel(p.window) : 0;
    if (p.channels_last && vectors) {
      run = kernel == 3   ? launch_depthwise_grad_input_channels_last<T, kV, 3>
            : kernel == 5 ? launch_depthwise_grad_input_channels_last<T, kV, 5>
            : kernel == 7 ? launch_depthwise_grad_input_channels_last<T, kV, 7>
                          : launch_depthwise_grad_input_channels_last<T, kV, 0>;
    } else if (!p.channels_last && kernel == 3) {
      run = launch_depthwise_grad_input_contiguous<T, 3>;
    }
  }
  run(p, stream);
}

}  // namespace dcconv::cuda
