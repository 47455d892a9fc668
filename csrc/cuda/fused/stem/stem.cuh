// First layers: few channels, so that the taps of all of them are gathered for a tile of positions
// and the sums over c r s run over shared memory: on tensor cores for the 16-bit types. The squares
// are summed as the taps come by.
#pragma once

#include "check.h"

#include "cuda/fused/strip.cuh"
#include "cuda/support/tensor_core.cuh"

namespace dcconv::cuda {

constexpr int kStemRows = 64;     // positions of a tile, 16 for each warp
constexpr int kStemFilters = 64;  // of a block
constexpr int kStemThreads = 2 * kStemRows;
constexpr int kStemTiles = kStemFilters / 8;     // products of 8 filters
constexpr int kStemPitch = kStemFilters + 4;     // of a row of dots: rows begin at 16 bytes
constexpr int kStemResident = 4 * kStemThreads;  // threads per multiprocessor, registers allowing

struct StemArgs {
  FusedParams p;
  PixelOf pixel_of;
  int depth;  // c r s
  int pitch;  // of a row of taps
};

template <class T>
constexpr bool kTensorCores = std::is_same<T, BFloat16>::value || std::is_same<T, Half>::value;

// Elements of a row of taps: whole products and 16 bytes that part the banks, or an odd number.
template <class T>
int stem_pitch(int64_t depth) {
  return static_cast<int>(kTensorCores<T> ? ceil_div(depth, 16) * 16 + kWide<T> : depth | 1);
}

template <class T>
std::size_t stem_shared(int64_t depth) {
  using A = typename ComputeType<T>::type;
  const int64_t pitch = stem_pitch<T>(depth);
  return SharedBytes()
      .take<T>(kStemFilters * pitch)
      .template take<T>(kStemRows * pitch)
      .template take<A>(kStemRows * kStemPitch)
      .template take<A>(kStemThreads)
      .template take<A>(kStemRows)
      .total();
}

// The taps of one position, every second one from `half` on, into `row`; returns their squares.
template <class T, class A>
__device__ __forceinline__ A
gather_taps(const StemArgs& args, int64_t position, bool inside, int half, T* row) {
  const FusedParams& p = args.p;
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  const int taps = rows.kernel * columns.kernel;
  const int64_t inputs = int64_t(rows.input) * columns.input;
  const Pixel at = args.pixel_of(inside ? position : 0);
  const int top = at.y * rows.stride - rows.before, left = at.x * columns.stride - columns.before;
  const T* image = static_cast<const T*>(p.x) + at.image * inputs * p.c;
  A total = 0;
  int r = half / columns.kernel, s = half - r * columns.kernel;
#pragma unroll 2
  for (int tap = half; tap < taps; tap += 2) {
    const int i = source_of(rows, top + r * rows.dilation);
    const int j = source_of(columns, left + s * columns.dilation);
    const bool valid = inside && i >= 0 && j >= 0;
    const int64_t pixel = int64_t(i) * columns.input + j;
    for (int c = 0; c < p.c; ++c) {
      T value{};
      if (valid)
        value = image[p.channels_last ? pixel * p.c + c : c * inputs + pixel];
      row[p.channels_last ? tap * p.c + c : c * taps + tap] = value;
      total += load(value) * load(value);
    }
    s += 2;
    while (s >= columns.kernel) {
      s -= columns.kernel;
      ++r;
    }
  }
  for (int k = args.depth + half; k < args.pitch; k += 2)
    row[k] = T{};
  return total;
}

// sums += taps of a warp's 16 rows times filters, laid out as mma's d: of the 8 filters of tile i,
// sums[i] has rows g and g + 8, filters 2 t and 2 t + 1.
template <class T, class A>
__device__ __forceinline__ void
tile_products(const T* taps, const T* filters, int pitch, int depth, A (&sums)[kStemTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kTensorCores<T>) {
    const int matrix = lane / 8, line = lane % 8;
    const T* own_taps = taps + ((matrix & 1) * 8 + line) * pitch + (matrix >> 1) * 8;
    const T* own_filters = filters + ((matrix >> 1) * 8 + line) * pitch + (matrix & 1) * 8;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[4];
      load_matrix_x4(a, own_taps + k);
#pragma unroll
      for (int tile = 0; tile < kStemTiles; tile += 2) {
        uint32_t pair[4];
        load_matrix_x4(pair, own_filters + tile * 8 * pitch + k);
        const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
        mma(sums[tile], a, first, T{});
        mma(sums[tile + 1], a, second, T{});
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < depth; ++k) {
      const A low = load(taps[g * pitch + k]), high = load(taps[(g + 8) * pitch + k]);
#pragma unroll
      for (int tile = 0; tile < kStemTiles; ++tile) {
        const T* w = filters + (tile * 8 + 2 * t) * pitch + k;
        const A first = load(w[0]), second = load(w[pitch]);
        sums[tile][0] += low * first;
        sums[tile][1] += low * second;
        sums[tile][2] += high * first;
        sums[tile][3] += high * second;
      }
    }
  }
}

// V = 4: channels last with vectors of filters. V = 1: either layout.
template <class T, int V>
__global__ void __launch_bounds__(kStemThreads, 4) stem_kernel(StemArgs args) {
  using A = typename ComputeType<T>::type;
  const FusedParams& p = args.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = static_cast<int>(blockIdx.y) * kStemFilters;
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t positions = p.n * outputs;
  const int64_t tiles = (positions + kStemRows - 1) / kStemRows;
  const Constants<A> constants = constants_of<A>(p.op);
  SharedMemory shared;
  T* weights = shared.take<T>(kStemFilters * args.pitch);  // [filters, pitch]
  T* taps = shared.take<T>(kStemRows * args.pitch);        // [positions, pitch]
  A* dots = shared.take<A>(kStemRows * kStemPitch);        // [positions, filters]
  A* squares = shared.take<A>(kStemThreads);               // [2, positions]
  A* norms = shared.take<A>(kStemRows);
  for (int i = thread; i < kStemFilters * args.pitch; i += kStemThreads) {
    const int o = i / args.pitch, k = i - o * args.pitch;
    weights[i] = chunk + o < p.o && k < args.depth
                     ? static_cast<const T*>(p.weight)[int64_t(chunk + o) * args.depth + k]
                     : T{};
  }
  // In the last step a thread owns filters in channels last, positions otherwise.
  constexpr int kOwners = V > 1 ? kStemFilters / V : kStemFilters;
  const int own = thread % kOwners, way = thread / kOwners;
  const int steps = V > 1 ? kStemRows : kStemFilters;
  Filters<Each<A, V>> filters{};
  if (V > 1 && chunk + own * V < p.o)
    load_filters<T>(p.filters, nullptr, chunk + own * V, filters);
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kStemRows;
    const int rows = static_cast<int>(at_most(int64_t(kStemRows), positions - first));
    const int row = thread % kStemRows, half = thread / kStemRows;
    squares[thread] =
        gather_taps<T, A>(args, first + row, row < rows, half, taps + row * args.pitch);
    __syncthreads();
    if (half == 0 && row < rows) {
      A b;
      if (p.map_is_norm) {
        b = static_cast<const A*>(p.map)[first + row];
      } else {
        b = sqrt_of(squares[row] + squares[kStemRows + row] + A(p.eps));
        if (p.norm != nullptr && chunk == 0)
          static_cast<A*>(p.norm)[first + row] = b;
      }
      norms[row] = b;
    }
    A sums[kStemTiles][4] = {};
    const int warp_row = thread / kWarp * 16;
    tile_products(taps + warp_row * args.pitch, weights, args.pitch, args.depth, sums);
    const int lane = thread % kWarp;
    A* out = dots + (warp_row + lane / 4) * kStemPitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kStemTiles; ++i) {
      // store_vector is for global memory.
      auto* low = reinterpret_cast<Vector<A, 2>*>(out + i * 8);
      auto* high = reinterpret_cast<Vector<A, 2>*>(out + 8 * kStemPitch + i * 8);
      *low = {{sums[i][0], sums[i][1]}};
      *high = {{sums[i][2], sums[i][3]}};
    }
    __syncthreads();
#pragma unroll 1
    for (int other = way; other < steps; other += kStemThreads / kOwners) {
      // Single elements of contiguous tensors: neighbouring threads on neighbouring positions.
      const bool by_filter = V > 1 || p.channels_last;
      const int position = V > 1 || by_filter ? other : own;
      const int filter = (by_filter ? own : other) * V;
      if (position >= rows || chunk + filter >= p.o)
        continue;
      if (V == 1)
        load_filters<T>(p.filters, nullptr, chunk + filter, filters);
      A dot[V], b[V];
      load_values(dots + position * kStemPitch + filter, dot);
#pragma unroll
      for (int v = 0; v < V; ++v)
        b[v] = norms[position];
      int64_t offset = (first + position) * p.o + chunk + filter;
      if (!p.channels_last) {
        const Pixel at = args.pixel_of(first + position);
        offset = (at.image * p.o + chunk + filter) * outputs +
                 int64_t(at.y) * p.window.columns.output + at.x;
      }
      store_outputs<T, A, V>(p, constants, filters, chunk + filter, dot, b, offset);
    }
  }
}

template <class T, int V>
void launch_stem(const FusedParams& p, Stream stream) {
  const int64_t positions = p.n * int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t depth = int64_t(p.window.rows.kernel) * p.window.columns.kernel * p.c;
  const int64_t chunks = ceil_div(p.o, kStemFilters), tiles = ceil_div(positions, kStemRows);
  const StemArgs args{
      p,
      PixelOf(p.n, p.window.rows.output, p.window.columns.output),
      static_cast<int>(depth),
      stem_pitch<T>(depth)
  };
  const int64_t blocks =
      std::max<int64_t>(persistent_blocks(tiles * chunks, kStemThreads, kStemResident) / chunks, 1);
  launch(
      "stem",
      stem_kernel<T, V>,
      Grid{std::min(tiles, blocks), chunks},
      kStemThreads,
      stem_shared<T>(depth),
      stream,
      args
  );
}

// Shared memory of a block on every device from sm_80 on.
constexpr std::size_t kStemShared = 99 << 10;

template <class T>
void stem_typed(const FusedParams& p, Stream stream) {
  const int64_t depth = int64_t(p.window.rows.kernel) * p.window.columns.kernel * p.c;
  DCCONV_CHECK(
      p.groups == 1 && stem_shared<T>(depth) <= kStemShared,
      "a stem must have one group and few taps, got ",
      p.groups,
      " and ",
      depth
  );
  bool vectors = p.channels_last && p.o % kDirectVector == 0;
  for (const void* pointer : {static_cast<const void*>(p.y), static_cast<const void*>(p.dot)})
    vectors = vectors && aligned16(pointer);
  auto run = launch_stem<T, 1>;
  if constexpr (!std::is_same<T, double>::value) {
    if (vectors)
      run = launch_stem<T, kDirectVector>;
  }
  run(p, stream);
}

}  // namespace dcconv::cuda
