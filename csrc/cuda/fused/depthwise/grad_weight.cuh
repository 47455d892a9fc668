// Depthwise: du and x -> dw. Blocks keep partial sums over their share of the positions; a second
// kernel adds them in a fixed order.
#pragma once

#include "cuda/fused/depthwise/forward.cuh"

namespace dcconv::cuda {

struct DepthwiseGradWeightArgs {
  DepthwiseGradWeightParams p;
  StripGeometry geometry;
  StripLanes lanes;  // channels last; every block has block_strips strips
  int ways;          // rows of taps, or taps, that threads side by side have
  PixelOf pixel_of;  // contiguous
};

// Taps of a pass over the positions in contiguous layout.
constexpr int kTapsAtOnce = 8;

// Sums over the strips of a block, for its chunk of channels. K > 0: a K x K window as
// in strip_sums, a row of taps per thread; K = 0: any window, a tap per thread.
template <class T, int V, int K>
__global__ void __launch_bounds__(kThreads, 2) depthwise_grad_weight_channels_last_kernel(
    DepthwiseGradWeightArgs args
) {
  using A = typename ComputeType<T>::type;
  constexpr int kTaps = K > 0 ? K : 1;
  const DepthwiseGradWeightParams& p = args.p;
  const StripGeometry& g = args.geometry;
  const StripLanes& lanes = args.lanes;
  const int slot = static_cast<int>(threadIdx.x) / lanes.columns;
  const int column = static_cast<int>(threadIdx.x) - slot * lanes.columns;
  const int row = slot / args.ways, way = slot - row * args.ways;
  const int filter = (static_cast<int>(blockIdx.y) * lanes.columns + column) * V;
  const int channel = V > 1 ? filter : filter / (p.o / p.c);
  const bool active = row < lanes.rows && filter < p.o;
  const int kernel = g.along.kernel, taps = kernel * g.across.kernel;
  const int all_ways = K > 0 ? K : taps;
  SharedMemory shared;
  A* sums = shared.take<A>(lanes.threads * kTaps * V);  // [taps, threads, V]
  const int64_t begin = int64_t(blockIdx.x) * lanes.block_strips;
  const int64_t end = at_most(begin + lanes.block_strips, lanes.strips);
  for (int first = 0; first < all_ways; first += args.ways) {
    const int own = first + way, r = K > 0 ? own : own / kernel, s = K > 0 ? 0 : own - r * kernel;
    A total[kTaps][V] = {};
#pragma unroll 1
    for (int64_t strip = begin + row; active && own < all_ways && strip < end;
         strip += lanes.rows) {
      const Pixel at = lanes.strip_of(strip);
      const int along = at.x * kStrip;
      const int i =
          source_of(g.across, at.y * g.across.stride - g.across.before + r * g.across.dilation);
      if (i < 0)
        continue;
      const T* x =
          static_cast<const T*>(p.x) + (at.image * g.across.input + i) * g.in.across + channel;
      const T* grad_u = static_cast<const T*>(p.grad_u) +
                        (at.image * g.across.output + at.y) * g.out.across + along * g.out.along +
                        filter;
      if constexpr (K > 0) {
        A du[kStrip][V] = {};
#pragma unroll
        for (int q = 0; q < kStrip; ++q)
          if (along + q < g.along.output)
            load_values(grad_u + q * g.out.along, du[q]);
        const int left = along - g.along.before;
#pragma unroll
        for (int c = 0; c < kStrip - 1 + K; ++c) {
          A value[V] = {};
          if (left + c >= 0 && left + c < g.along.input)
            load_values(x + (left + c) * g.in.along, value);
#pragma unroll
          for (int q = 0; q < kStrip; ++q) {
            if (c < q || c >= q + K)
              continue;
#pragma unroll
            for (int v = 0; v < V; ++v)
              total[c - q][v] += du[q][v] * value[v];
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < kStrip; ++q) {
          if (along + q >= g.along.output)
            continue;
          const int j = source_of(
              g.along, (along + q) * g.along.stride - g.along.before + s * g.along.dilation
          );
          if (j < 0)
            continue;
          A du[V], value[V];
          load_values(grad_u + q * g.out.along, du);
          load_values(x + j * g.in.along, value);
#pragma unroll
          for (int v = 0; v < V; ++v)
            total[0][v] += du[v] * value[v];
        }
      }
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        sums[(tap * lanes.threads + static_cast<int>(threadIdx.x)) * V + v] = total[tap][v];
    }
    __syncthreads();
    if (active && row == 0 && own < all_ways) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        Vector<A, V> result{};
        for (int other = 0; other < lanes.rows; ++other) {
          const int thread = (other * args.ways + way) * lanes.columns + column;
#pragma unroll
          for (int v = 0; v < V; ++v)
            result.at[v] += sums[(tap * lanes.threads + thread) * V + v];
        }
        store_vector(
            static_cast<A*>(p.parts) + (int64_t(blockIdx.x) * taps + own * kTaps + tap) * p.o +
                filter,
            result
        );
      }
    }
    __syncthreads();
  }
}

// Sums over a run of the positions of one filter, a few taps at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) depthwise_grad_weight_contiguous_kernel(
    DepthwiseGradWeightArgs args
) {
  using A = typename ComputeType<T>::type;
  const DepthwiseGradWeightParams& p = args.p;
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  const int taps = rows.kernel * columns.kernel;
  const int64_t inputs = int64_t(rows.input) * columns.input;
  const int64_t outputs = int64_t(rows.output) * columns.output, positions = p.n * outputs;
  const int64_t share = (positions + p.rows - 1) / p.rows;
  const int64_t begin = int64_t(blockIdx.x) * share, end = at_most(begin + share, positions);
  SharedMemory shared;
  A* scratch = shared.take<A>(kWarp);
  for (int filter = static_cast<int>(blockIdx.y); filter < p.o;
       filter += static_cast<int>(gridDim.y)) {
    const int channel = filter / (p.o / p.c);
    for (int first = 0; first < taps; first += kTapsAtOnce) {
      A total[kTapsAtOnce] = {};
#pragma unroll 1
      for (int64_t position = begin + threadIdx.x; position < end; position += kThreads) {
        const Pixel at = args.pixel_of(position);
        const A du = load(
            static_cast<const T*>(
                p.grad_u
            )[(at.image * p.o + filter) * outputs + int64_t(at.y) * columns.output + at.x]
        );
        const T* x = static_cast<const T*>(p.x) + (at.image * p.c + channel) * inputs;
        int r = first / columns.kernel, s = first - r * columns.kernel;
#pragma unroll
        for (int t = 0; t < kTapsAtOnce; ++t) {
          const int i = source_of(rows, at.y * rows.stride - rows.before + r * rows.dilation);
          const int j =
              source_of(columns, at.x * columns.stride - columns.before + s * columns.dilation);
          if (first + t < taps && i >= 0 && j >= 0)
            total[t] += du * load(x[int64_t(i) * columns.input + j]);
          if (++s == columns.kernel) {
            s = 0;
            ++r;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTapsAtOnce; ++t) {
        const A sum = block_sum(total[t], scratch);
        if (threadIdx.x == 0 && first + t < taps)
          static_cast<A*>(p.parts)[(int64_t(blockIdx.x) * taps + first + t) * p.o + filter] = sum;
        __syncthreads();
      }
    }
  }
}

// parts [rows, r s, o] -> dw [o, r s], in the order of the rows. A warp has 32 filters of one tap.
template <class T>
__global__ void
__launch_bounds__(kThreads) depthwise_weight_sums_kernel(DepthwiseGradWeightParams p) {
  using A = typename ComputeType<T>::type;
  SharedMemory shared;
  double* partial = shared.take<double>(kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int way = static_cast<int>(threadIdx.x) / kWarp;
  const int filter = static_cast<int>(blockIdx.x) * kWarp + lane;
  const int taps = p.window.rows.kernel * p.window.columns.kernel;
  for (int tap = static_cast<int>(blockIdx.y); tap < taps; tap += static_cast<int>(gridDim.y)) {
    double total = 0;
    if (filter < p.o) {
      for (int64_t row = way; row < p.rows; row += kThreads / kWarp)
        total += double(static_cast<const A*>(p.parts)[(row * taps + tap) * p.o + filter]);
    }
    partial[threadIdx.x] = total;
    __syncthreads();
    if (way == 0 && filter < p.o) {
      for (int other = 1; other < kThreads / kWarp; ++other)
        total += partial[other * kWarp + lane];
      // One channel per filter: both layouts of dw are this one.
      static_cast<T*>(p.grad_weight)[int64_t(filter) * taps + tap] = Store<T>::from(A(total));
    }
    __syncthreads();
  }
}

template <class T, int V, int K>
void launch_grad_weight_channels_last(const DepthwiseGradWeightParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int taps = p.window.rows.kernel * p.window.columns.kernel;
  const int columns = kDirectColumns * (V > 1 ? 1 : kDirectVector);
  DepthwiseGradWeightArgs args{
      p,
      strip_geometry(p.window, true, p.c, p.o, p.c),
      strip_lanes(p.n, p.o, p.window.rows.output, p.window.columns.output, true, V, columns),
      1,
      PixelOf()
  };
  StripLanes& lanes = args.lanes;
  args.ways = std::min(K > 0 ? K : taps, lanes.rows);
  lanes.rows /= args.ways;
  lanes.block_strips = ceil_div(lanes.strips, p.rows);
  launch(
      "depthwise_grad_weight_channels_last",
      depthwise_grad_weight_channels_last_kernel<T, V, K>,
      Grid{p.rows, lanes.chunks},
      lanes.threads,
      SharedBytes().take<A>(int64_t(lanes.threads) * (K > 0 ? K : 1) * V).total(),
      stream,
      args
  );
}

template <class T>
void launch_grad_weight_contiguous(const DepthwiseGradWeightParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const DepthwiseGradWeightArgs args{
      p,
      StripGeometry{},
      StripLanes{},
      1,
      PixelOf(p.n, p.window.rows.output, p.window.columns.output)
  };
  launch(
      "depthwise_grad_weight_contiguous",
      depthwise_grad_weight_contiguous_kernel<T>,
      Grid{p.rows, std::min<int64_t>(p.o, kMaxGridY)},
      kThreads,
      SharedBytes().take<A>(kWarp).total(),
      stream,
      args
  );
}

template <class T>
void sum_weight_parts(const DepthwiseGradWeightParams& p, Stream stream) {
  const int taps = p.window.rows.kernel * p.window.columns.kernel;
  launch(
      "depthwise_weight_sums",
      depthwise_weight_sums_kernel<T>,
      Grid{ceil_div(p.o, kWarp), std::min<int64_t>(taps, kMaxGridY)},
      kThreads,
      SharedBytes().take<double>(kThreads).total(),
      stream,
      p
  );
}

template <class T>
void depthwise_grad_weight_typed(const DepthwiseGradWeightParams& p, Stream stream) {
  auto run = p.channels_last ? launch_grad_weight_channels_last<T, 1, 0>
                             : launch_grad_weight_contiguous<T>;
  if constexpr (!std::is_same<T, double>::value) {
    constexpr int kV = kDirectVector;
    if (p.channels_last && takes_channel_vectors(p.c, p.o, p.c, {p.x, p.grad_u, p.parts})) {
      const int kernel = plain_kernel(p.window);
      run = kernel == 3   ? launch_grad_weight_channels_last<T, kV, 3>
            : kernel == 5 ? launch_grad_weight_channels_last<T, kV, 5>
            : kernel == 7 ? launch_grad_weight_channels_last<T, kV, 7>
                          : launch_grad_weight_channels_last<T, kV, 0>;
    }
  }
  run(p, stream);
  sum_weight_parts<T>(p, stream);
}

}  // namespace dcconv::cuda
