// dx = fold(library gradient of the padded input) + x * t, with t the transposed window sum of what
// the output positions say about the norms of their windows, taken once per pixel and group.
#pragma once

#include "cuda/passes/epilogue.cuh"
#include "cuda/passes/tiles.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

struct GradInputArgs {
  GradInputParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  PixelOf pixel_of;
  int turns;  // channels last: of a tile
};

// Blocks of a multiprocessor: what the registers are bounded to, and what is launched. Folding
// takes more of them.
template <bool kPlain>
constexpr int kGradInputBlocks = kPlain ? 3 : 2;

// Vectors of a thread in a tile, at most.
constexpr int kGradInputTurns = 16;

// Vectors of each tensor on their way: three of four slots.
constexpr int kGradInputSlots = 4;

// Vectors of less than 16 bytes, which nothing copies ahead, are loaded so many at a time.
constexpr int kGradInputAtOnce = 4;

// f(vectors, i, place) for 0 <= i < count: vectors at `offset` of the bases, `step` elements apart.
template <class T, int V, int N, class F>
__device__ __forceinline__ void
each_vector(const T* const (&bases)[N], int64_t offset, int64_t step, int count, F&& f) {
#pragma unroll 1
  for (int i = 0; i < count; i += kGradInputAtOnce, offset += kGradInputAtOnce * step) {
    Vector<T, V> vectors[kGradInputAtOnce][N];
#pragma unroll
    for (int k = 0; k < kGradInputAtOnce; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (i + k < count)
          vectors[k][n] = load_vector<T, V>(bases[n] + offset + k * step);
      }
    }
#pragma unroll
    for (int k = 0; k < kGradInputAtOnce; ++k) {
      if (i + k < count)
        f(vectors[k], i + k, offset + k * step);
    }
  }
}

// Channels of a tile that a warp has at least, where there are so many: a barrier is rare then.
constexpr int kGradInputChannels = 4;

// Tensors that are copied ahead: x and, where its elements are those of x, the library's gradient.
template <bool kPlain>
constexpr int kGradInputStreams = kPlain ? 2 : 1;

template <class A>
__device__ __forceinline__ A
transposed_norm(const GradInputArgs& args, const Pixel& at, int group) {
  const GradInputParams& p = args.p;
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const MapPlane plane = map_plane(at.image, group, outputs, p.groups, p.channels_last);
  const A* t = static_cast<const A*>(p.t);
  if (p.tap == Tap::plain) {
    return transposed_window_sum<A>(p.window, plane, at.y, at.x, [&](int64_t i) { return t[i]; });
  }
  const A* b = static_cast<const A*>(p.norm);
  if (p.tap == Tap::over_norm) {
    return transposed_window_sum<A>(p.window, plane, at.y, at.x, [&](int64_t i) {
      return t[i] * reciprocal_of(b[i]);
    });
  }
  const A sigma = *static_cast<const A*>(p.sigma);
  return transposed_window_sum<A>(p.window, plane, at.y, at.x, [&](int64_t i) {
    return t[i] + sigma * reciprocal_of(b[i]);
  });
}

__host__ __device__ __forceinline__ int64_t padded_size(const Window& w) {
  return int64_t(w.rows.input + w.rows.before + w.rows.after) *
         (w.columns.input + w.columns.before + w.columns.after);
}

// Sum of the library's gradient over the padded pixels that show a pixel: V elements, `stride`
// elements apart in memory between pixels; zeros where there is no such gradient.
template <class T, class A, int V>
__device__ __forceinline__ void
folded(const GradInputParams& p, const Pixel& at, const T* image, int64_t stride, A (&sum)[V]) {
  const int width = p.window.columns.input + p.window.columns.before + p.window.columns.after;
  const Showing rows(p.window.rows, at.y), columns(p.window.columns, at.x);
#pragma unroll
  for (int j = 0; j < V; ++j)
    sum[j] = A(0);
  if (p.library_grad == nullptr)
    return;
  rows.each([&](int y) {
    columns.each([&](int x) {
      const Vector<T, V> v = load_vector<T, V>(image + (int64_t(y) * width + x) * stride);
#pragma unroll
      for (int j = 0; j < V; ++j)
        sum[j] += load(v.at[j]);
    });
  });
}

// What the library's gradient adds to a vector of x.
template <class T, int V, class A, int N, class F>
__device__ __forceinline__ Vector<T, V>
input_grads(const Vector<T, V> (&vectors)[N], const A (&t)[V], F&& rest) {
  A x[V], sum[V];
  unpack(vectors[0], x);
  if constexpr (N == 2) {
    unpack(vectors[1], sum);
  } else {
    rest(sum);
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    sum[j] += x[j] * t[j];
  return pack<T, V>(sum);
}

template <class T, int V, bool kPlain>
__global__ void __launch_bounds__(
    kThreads, kGradInputBlocks<kPlain>
) grad_input_channels_last_kernel(GradInputArgs args) {
  using A = typename ComputeType<T>::type;
  constexpr int N = kGradInputStreams<kPlain>;
  const GradInputParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const int tile_rows = lanes.rows * args.turns, tile_values = tile_rows * lanes.chunk_groups;
  SharedMemory shared;
  VectorRing<T, V, N, kGradInputSlots> ring(shared);
  A* scales = shared.take<A>(2 * tile_values);  // two halves, written in turn
  const int64_t positions = p.n * int64_t(p.window.rows.input) * p.window.columns.input;
  const int64_t padded_pixels = padded_size(p.window);
  const RowRange range(positions, lanes);
  const int64_t step = int64_t(lanes.rows) * p.c;
  const T* x = static_cast<const T*>(p.x);
  const T* library = static_cast<const T*>(p.library_grad);
  T* out = static_cast<T*>(p.grad_x);
  int half = 0;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const ChunkPlace place(lanes, lane, chunk, V, p.c, p.c / p.groups);
    int64_t offset = (range.begin + lane.row) * p.c + place.channel;
    const T* bases[N];
    bases[0] = x;
    if constexpr (kPlain)
      bases[1] = library;
    RowStream<T, V, N, kGradInputSlots> stream(
        ring, bases, offset, step, place.active ? range.turns(lane.row, lanes) : 0
    );
    for (int64_t first = range.begin; first < range.end; first += tile_rows, half ^= 1) {
      const int rows = static_cast<int>(at_most(int64_t(tile_rows), range.end - first));
      A* scale = scales + half * tile_values;
      for (int i = static_cast<int>(threadIdx.x); i < rows * place.groups; i += lanes.threads) {
        const int row = place.groups == 1 ? i : i / place.groups;
        const int group = place.first_group + i - row * place.groups;
        scale[i] = transposed_norm<A>(args, args.pixel_of(first + row), group);
      }
      __syncthreads();
      if (!place.active)
        continue;
      const auto finish = [&](const Vector<T, V>(&vectors)[N], int row, int64_t to) {
        A t[V];
#pragma unroll
        for (int j = 0; j < V; ++j)
          t[j] = scale[row * place.groups + place.own_group];
        store_vector(
            out + to, input_grads<T, V>(vectors, t, [&](A(&sum)[V]) {
              const Pixel at = args.pixel_of(first + row);
              folded(p, at, library + at.image * padded_pixels * p.c + place.channel, p.c, sum);
            })
        );
      };
      if constexpr (VectorRing<T, V, N, kGradInputSlots>::kAsync) {
#pragma unroll 1
        for (int row = lane.row; row < rows; row += lanes.rows, offset += step) {
          Vector<T, V> vectors[N];
          stream.take(vectors);
          finish(vectors, row, offset);
          stream.advance();
        }
      } else {
        const int count = (rows - lane.row + lanes.rows - 1) / lanes.rows;
        each_vector<T, V>(bases, offset, step, count, [&](const auto& vectors, int i, int64_t to) {
          finish(vectors, lane.row + i * lanes.rows, to);
        });
        offset += count * step;
      }
    }
  }
}

template <class T, int V, bool kPlain>
__global__ void __launch_bounds__(kThreads, kGradInputBlocks<kPlain>) grad_input_contiguous_kernel(
    GradInputArgs args
) {
  using A = typename ComputeType<T>::type;
  constexpr int N = kGradInputStreams<kPlain>;
  const GradInputParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways, per_group = p.c / p.groups;
  const int span = kWarp * V, tile_positions = span * args.plane_lanes.tiles;
  SharedMemory shared;
  VectorRing<T, V, N, kGradInputSlots> ring(shared);
  A* scales = shared.take<A>(2 * tile_positions);
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  const int64_t padded_pixels = padded_size(p.window);
  const int64_t positions = p.n * inputs;
  const Share tiles((positions + tile_positions - 1) / tile_positions);
  const PlanePlace place{inputs, p.c, positions, tile_positions, lane.tile * span + lane.lane * V};
  int half = 0;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const int64_t channel = int64_t(group) * per_group;
    const T* bases[N];
    bases[0] = static_cast<const T*>(p.x) + channel * inputs;
    if constexpr (kPlain)
      bases[1] = static_cast<const T*>(p.library_grad) + channel * inputs;
    T* out = static_cast<T*>(p.grad_x) + channel * inputs;
    PlaneStream<T, V, N, kGradInputSlots> stream(
        ring, bases, place, args.pixel_of, tiles, lane.way, per_group, ways
    );
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, half ^= 1) {
      const int64_t first = tile * tile_positions;
      const int count = static_cast<int>(at_most(int64_t(tile_positions), positions - first));
      A* scale = scales + half * tile_positions;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
        scale[i] = transposed_norm<A>(args, args.pixel_of(first + i), group);
      __syncthreads();
      if (place.own >= count)
        continue;
      A t[V];
      load_neighbours(scale + place.own, t);
      const auto finish = [&](const Vector<T, V>(&vectors)[N], int c, int64_t to) {
        store_vector(out + to, input_grads<T, V>(vectors, t, [&](A(&sum)[V]) {
                       // Neighbours may lie in different rows: pixel by pixel.
                       const int64_t image = args.pixel_of.image(first + place.own);
                       const T* plane = static_cast<const T*>(p.library_grad) +
                                        (image * p.c + channel + c) * padded_pixels;
#pragma unroll
                       for (int j = 0; j < V; ++j) {
                         A one[1];
                         folded<T>(p, args.pixel_of(first + place.own + j), plane, 1, one);
                         sum[j] = one[0];
                       }
                     }));
      };
      int64_t offset = place.base(args.pixel_of, tile) + lane.way * inputs;
      const int64_t step = ways * inputs;
      if constexpr (VectorRing<T, V, N, kGradInputSlots>::kAsync) {
#pragma unroll 1
        for (int c = lane.way; c < per_group; c += ways, offset += step) {
          Vector<T, V> vectors[N];
          stream.take(offset, vectors);
          finish(vectors, c, offset);
          stream.advance();
        }
      } else {
        const int count = (per_group - lane.way + ways - 1) / ways;
        each_vector<T, V>(bases, offset, step, count, [&](const auto& vectors, int i, int64_t to) {
          finish(vectors, lane.way + i * ways, to);
        });
      }
    }
  }
}

template <class T, int V, bool kPlain>
void launch_grad_input(const GradInputParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const RowLanes lanes = p.channels_last ? row_lanes(p.c, p.groups, V) : RowLanes{};
  const GradInputArgs args{
      p,
      lanes,
      plane_lanes(ceil_div(p.c / p.groups, kGradInputChannels)),
      PixelOf(p.n, p.window.rows.input, p.window.columns.input),
      p.channels_last ? tile_turns<A>(lanes, kGradInputTurns) : 0
  };
  const int64_t positions = p.n * int64_t(p.window.rows.input) * p.window.columns.input;
  if (positions == 0)
    return;
  using Ring = VectorRing<T, V, kGradInputStreams<kPlain>, kGradInputSlots>;
  SharedBytes bytes;
  bytes.take<unsigned char>(Ring::kBytes);
  if (p.channels_last) {
    launch(
        "grad_input_channels_last",
        grad_input_channels_last_kernel<T, V, kPlain>,
        Grid{persistent_blocks(
            ceil_div(positions, lanes.rows), lanes.threads, kGradInputBlocks<kPlain> * lanes.threads
        )},
        lanes.threads,
        bytes.take<A>(int64_t(2) * lanes.rows * args.turns * lanes.chunk_groups).total(),
        stream,
        args
    );
    return;
  }
  const int64_t tile_positions = int64_t(kWarp) * V * args.plane_lanes.tiles;
  launch(
      "grad_input_contiguous",
      grad_input_contiguous_kernel<T, V, kPlain>,
      Grid{
          persistent_blocks(
              ceil_div(positions, tile_positions), kThreads, kGradInputBlocks<kPlain> * kThreads
          ),
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      bytes.take<A>(2 * tile_positions).total(),
      stream,
      args
  );
}

template <class T>
void grad_input_typed(const GradInputParams& p, Stream stream) {
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  const bool plain = p.library_grad != nullptr && !p.padded;
  if (takes_wide_vectors<T>(
          p.channels_last, p.c / p.groups, inputs, {p.x, p.grad_x, p.library_grad}
      )) {
    const auto run =
        plain ? launch_grad_input<T, kWide<T>, true> : launch_grad_input<T, kWide<T>, false>;
    run(p, stream);
  } else {
    const auto run = plain ? launch_grad_input<T, 1, true> : launch_grad_input<T, 1, false>;
    run(p, stream);
  }
}

}  // namespace dcconv::cuda
