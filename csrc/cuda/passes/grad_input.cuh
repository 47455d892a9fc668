// dx = fold(library gradient of the padded input) + x * t, with t the transposed window sum of what
// the output positions say about the norms of their windows, taken once per pixel and group.
#pragma once

#include "cuda/passes/epilogue.cuh"

namespace dcconv::cuda {

struct GradInputArgs {
  GradInputParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  PixelOf pixel_of;
};

// Rows of a tile per thread.
constexpr int kGradInputRows = 4;

// Threads per multiprocessor that the registers allow (at most 128 each).
constexpr int kGradInputResident = 2 * kThreads;

template <class A>
__device__ __forceinline__ A
transposed_norm(const GradInputArgs& args, const Pixel& at, int group) {
  const GradInputParams& p = args.p;
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const MapPlane plane = map_plane(at.image, group, outputs, p.groups, p.channels_last);
  const A* t = static_cast<const A*>(p.t);
  const A* b = static_cast<const A*>(p.norm);
  const A sigma = p.tap == Tap::with_mean ? *static_cast<const A*>(p.sigma) : A(0);
  return transposed_window_sum<A>(p.window, plane, at.y, at.x, [&](int64_t i) {
    switch (p.tap) {
    case Tap::with_mean:
      return t[i] + sigma / b[i];
    case Tap::over_norm:
      return t[i] / b[i];
    default:
      return t[i];
    }
  });
}

// Sum of the library's gradient over the padded pixels that show a pixel: V elements, `stride`
// elements apart in memory between pixels.
template <class T, class A, int V>
__device__ __forceinline__ void
folded(const GradInputParams& p, const Pixel& at, const T* image, int64_t stride, A (&sum)[V]) {
  const int width = p.window.columns.input + p.window.columns.before + p.window.columns.after;
  const Showing rows(p.window.rows, at.y), columns(p.window.columns, at.x);
#pragma unroll
  for (int j = 0; j < V; ++j)
    sum[j] = A(0);
  rows.each([&](int y) {
    columns.each([&](int x) {
      const Vector<T, V> v = load_vector<T, V>(image + (int64_t(y) * width + x) * stride);
#pragma unroll
      for (int j = 0; j < V; ++j)
        sum[j] += load(v.at[j]);
    });
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) grad_input_channels_last_kernel(GradInputArgs args) {
  using A = typename ComputeType<T>::type;
  const GradInputParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const int tile_rows = lanes.rows * kGradInputRows, per_group = p.c / p.groups;
  const int tile_values = tile_rows * lanes.chunk_groups;
  SharedMemory shared;
  A* scales = shared.take<A>(2 * tile_values);  // two halves, written in turn
  const int64_t positions = p.n * int64_t(p.window.rows.input) * p.window.columns.input;
  const int64_t tiles = (positions + tile_rows - 1) / tile_rows;
  const int64_t padded_pixels =
      int64_t(p.window.rows.input + p.window.rows.before + p.window.rows.after) *
      (p.window.columns.input + p.window.columns.before + p.window.columns.after);
  const T* x = static_cast<const T*>(p.x);
  const T* library = static_cast<const T*>(p.library_grad);
  const bool plain = library != nullptr && !p.padded;
  T* out = static_cast<T*>(p.grad_x);
  int half = 0;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const int channel = (chunk + lane.column) * V;
    const bool active = lane.row < lanes.rows && channel < p.c;
    const int chunk_end = at_most((chunk + lanes.columns) * V, p.c);
    const int first_group = chunk * V / per_group;
    const int groups = (chunk_end - 1) / per_group + 1 - first_group;
    const int own_group = channel / per_group - first_group;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_rows;
      const int rows = static_cast<int>(at_most(int64_t(tile_rows), positions - first));
      const int64_t offset = first * p.c + channel;
      const auto fetch = [&](const T* from, bool wanted, int row) {
        Vector<T, V> v{};
        if (wanted && active && row < rows)
          v = load_vector<T, V>(from + offset + int64_t(row) * p.c);
        return v;
      };
      Vector<T, V> input = fetch(x, true, lane.row), grad = fetch(library, plain, lane.row);
      A* scale = scales + half * tile_values;
      for (int i = static_cast<int>(threadIdx.x); i < rows * groups; i += lanes.threads) {
        const int row = groups == 1 ? i : i / groups, group = first_group + i - row * groups;
        scale[i] = transposed_norm<A>(args, args.pixel_of(first + row), group);
      }
      __syncthreads();
      if (!active)
        continue;
#pragma unroll 1
      for (int row = lane.row; row < rows; row += lanes.rows) {
        const Vector<T, V> next_input = fetch(x, true, row + lanes.rows);
        const Vector<T, V> next_grad = fetch(library, plain, row + lanes.rows);
        const A t = scale[row * groups + own_group];
        A sum[V] = {};
        if (plain) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            sum[j] = load(grad.at[j]);
        } else if (library != nullptr) {
          const Pixel at = args.pixel_of(first + row);
          folded(p, at, library + at.image * padded_pixels * p.c + channel, p.c, sum);
        }
        Vector<T, V> result;
#pragma unroll
        for (int j = 0; j < V; ++j)
          result.at[j] = Store<T>::from(sum[j] + load(input.at[j]) * t);
        store_vector(out + offset + int64_t(row) * p.c, result);
        input = next_input;
        grad = next_grad;
      }
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) grad_input_contiguous_kernel(GradInputArgs args) {
  using A = typename ComputeType<T>::type;
  const GradInputParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways, per_group = p.c / p.groups;
  const int span = kWarp * V, tile_positions = span * args.plane_lanes.tiles;
  SharedMemory shared;
  A* scales = shared.take<A>(2 * tile_positions);
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  const int64_t padded_pixels =
      int64_t(p.window.rows.input + p.window.rows.before + p.window.rows.after) *
      (p.window.columns.input + p.window.columns.before + p.window.columns.after);
  const int64_t positions = p.n * inputs;
  const int64_t tiles = (positions + tile_positions - 1) / tile_positions;
  const int own = lane.tile * span + lane.lane * V;
  const bool plain = p.library_grad != nullptr && !p.padded;
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
      const int64_t first = tile * tile_positions;
      const int count = static_cast<int>(at_most(int64_t(tile_positions), positions - first));
      A* scale = scales + half * tile_positions;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
        scale[i] = transposed_norm<A>(args, args.pixel_of(first + i), group);
      __syncthreads();
      if (own >= count)
        continue;
      A t[V];
#pragma unroll
      for (int j = 0; j < V; ++j)
        t[j] = scale[own + j];
      const Pixel at = args.pixel_of(first + own);
      const int64_t channel = at.image * p.c + int64_t(group) * per_group;
      const int64_t base = channel * inputs + int64_t(at.y) * p.window.columns.input + at.x;
      const auto fetch = [&](const void* from, bool wanted, int c) {
        Vector<T, V> v{};
        if (wanted && c < per_group)
          v = load_vector<T, V>(static_cast<const T*>(from) + base + c * inputs);
        return v;
      };
      Vector<T, V> input = fetch(p.x, true, lane.way);
      Vector<T, V> grad = fetch(p.library_grad, plain, lane.way);
#pragma unroll 1
      for (int c = lane.way; c < per_group; c += ways) {
        const Vector<T, V> next_input = fetch(p.x, true, c + ways);
        const Vector<T, V> next_grad = fetch(p.library_grad, plain, c + ways);
        A sum[V] = {};
        if (plain) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            sum[j] = load(grad.at[j]);
        } else if (p.library_grad != nullptr) {
          const T* image = static_cast<const T*>(p.library_grad) + (channel + c) * padded_pixels;
          // Neighbours may lie in different rows: pixel by pixel.
#pragma unroll
          for (int j = 0; j < V; ++j) {
            A one[1];
            folded<T>(p, args.pixel_of(first + own + j), image, 1, one);
            sum[j] = one[0];
          }
        }
        Vector<T, V> result;
#pragma unroll
        for (int j = 0; j < V; ++j)
          result.at[j] = Store<T>::from(sum[j] + load(input.at[j]) * t[j]);
        store_vector(static_cast<T*>(p.grad_x) + base + c * inputs, result);
        input = next_input;
        grad = next_grad;
      }
    }
  }
}

template <class T, int V>
void launch_grad_input(const GradInputParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const GradInputArgs args{
      p,
      p.channels_last ? row_lanes(p.c, p.groups, V) : RowLanes{},
      plane_lanes(p.c / p.groups),
      PixelOf(p.n, p.window.rows.input, p.window.columns.input)
  };
  const int64_t positions = p.n * int64_t(p.window.rows.input) * p.window.columns.input;
  if (positions == 0)
    return;
  if (p.channels_last) {
    const int64_t tile_rows = int64_t(args.row_lanes.rows) * kGradInputRows;
    launch(
        "grad_input_channels_last",
        grad_input_channels_last_kernel<T, V>,
        Grid{persistent_blocks(
            ceil_div(positions, tile_rows), args.row_lanes.threads, kGradInputResident
        )},
        args.row_lanes.threads,
        SharedBytes().take<A>(2 * tile_rows * args.row_lanes.chunk_groups).total(),
        stream,
        args
    );
    return;
  }
  const int64_t tile_positions = int64_t(kWarp) * V * args.plane_lanes.tiles;
  launch(
      "grad_input_contiguous",
      grad_input_contiguous_kernel<T, V>,
      Grid{
          persistent_blocks(ceil_div(positions, tile_positions), kThreads, kGradInputResident),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      SharedBytes().take<A>(2 * tile_positions).total(),
      stream,
      args
  );
}

template <class T>
void grad_input_typed(const GradInputParams& p, Stream stream) {
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  if (takes_wide_vectors<T>(
          p.channels_last, p.c / p.groups, inputs, {p.x, p.grad_x, p.library_grad}
      )) {
    launch_grad_input<T, kWide<T>>(p, stream);
  } else {
    launch_grad_input<T, 1>(p, stream);
  }
}

}  // namespace dcconv::cuda
