// How the passes over y walk through their tensors: every block takes one even share of the rows
// (channels last) or of the tiles of positions (contiguous), and copies ahead without regard to
// where a tile ends. What is known of positions lies in shared memory for a tile, in two halves
// that are written in turn: one barrier a tile.
#pragma once

#include "cuda/support/lanes.cuh"
#include "cuda/support/ring.cuh"
#include "cuda/support/window.cuh"

namespace dcconv::cuda {

// An even share of `units` for this block.
struct Share {
  int64_t begin, end;

  __device__ __forceinline__ explicit Share(int64_t units)
      : begin(units * blockIdx.x / gridDim.x), end(units * (blockIdx.x + 1) / gridDim.x) {}
};

// Vectors of a thread in a tile: at most `most`, and so many that a number of each of a tile's
// positions and groups takes kTileBytes of shared memory; at least one.
constexpr int kTileBytes = 2048;

template <class A>
int tile_turns(const RowLanes& lanes, int most) {
  const int fitting = kTileBytes / static_cast<int>(sizeof(A)) / (lanes.rows * lanes.chunk_groups);
  return fitting < 1 ? 1 : fitting < most ? fitting : most;
}

// Channels last: the rows of a block. A turn is one vector of each thread; their number fits an
// int, because 2^31 turns of at least 129 elements are more than any GPU's memory.
struct RowRange {
  int64_t begin, end;

  __device__ __forceinline__ RowRange(int64_t positions, const RowLanes& lanes) {
    const Share turns((positions + lanes.rows - 1) / lanes.rows);
    begin = turns.begin * lanes.rows;
    end = at_most(turns.end * lanes.rows, positions);
  }

  // Turns of the thread whose first row is `row` rows after the first of the block.
  __device__ __forceinline__ int turns(int row, const RowLanes& lanes) const {
    return begin + row < end ? static_cast<int>((end - begin - row - 1) / lanes.rows) + 1 : 0;
  }
};

// The channels of a chunk and the groups that they touch.
struct ChunkPlace {
  int channel;      // the first of the thread's vector
  int end;          // of the chunk's channels
  int first_group;  // of the chunk
  int groups;       // that it touches
  int own_group;    // the thread's, counted from first_group
  bool active;      // whether the thread has a vector

  __device__ __forceinline__ ChunkPlace(
      const RowLanes& lanes, const RowLane& lane, int chunk, int width, int channels, int per_group
  )
      : channel((chunk + lane.column) * width),
        end(at_most((chunk + lanes.columns) * width, channels)),
        first_group(chunk * width / per_group), groups((end - 1) / per_group + 1 - first_group),
        own_group(channel / per_group - first_group),
        active(lane.row < lanes.rows && channel < channels) {}
};

// Streams of rows, channels last: turn after turn of one chunk.
template <class T, int V, int N, int Slots>
class RowStream {
public:
  using Ring = VectorRing<T, V, N, Slots>;

  // bases: the tensors; offset: of the thread's first vector; step: from turn to turn, in elements.
  __device__ __forceinline__
  RowStream(Ring& ring, const T* const (&bases)[N], int64_t offset, int64_t step, int turns)
      : ring_(ring), step_(step), left_(turns) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      from_[n] = ahead_[n] = bases[n] + offset;
    ring_.restart();
#pragma unroll 1
    for (int i = 0; i < Ring::kAhead; ++i)
      advance();
  }

  __device__ __forceinline__ void take(Vector<T, V> (&out)[N]) {
    ring_.take(from_, out);
    if constexpr (!Ring::kAsync) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        from_[n] += step_;
    }
  }

  // Starts the copies of the vectors that come Ring::kAhead turns after those taken last.
  __device__ __forceinline__ void advance() {
    ring_.ahead(ahead_, left_ > 0);
    --left_;
#pragma unroll
    for (int n = 0; n < N; ++n)
      ahead_[n] += step_;
  }

private:
  Ring& ring_;
  const T* from_[N];
  const T* ahead_[N];
  int64_t step_;
  int left_;
};

// Where the number of a position and group lies in a contiguous map.
__device__ __forceinline__ int64_t
map_offset(const PixelOf& pixel_of, int64_t position, int64_t pixels, int group, int groups) {
  return (pixel_of.image(position) * (groups - 1) + group) * pixels + position;
}

// Where the tiles of a contiguous tensor lie: a warp has 32 V neighbouring positions of all images.
struct PlanePlace {
  int64_t pixels;    // of a plane
  int64_t channels;  // of the tensor
  int64_t positions;
  int tile_positions;
  int own;  // the thread's first position in a tile

  // Offset of the thread's positions in channel 0 of their image; -1 where it has none.
  __device__ __forceinline__ int64_t base(const PixelOf& pixel_of, int64_t tile) const {
    const int64_t position = tile * tile_positions + own;
    if (position >= positions)
      return -1;
    const int64_t image = pixel_of.image(position);
    return image * (channels - 1) * pixels + position;
  }
};

// V neighbouring numbers of shared memory, in accesses of 16 bytes.
template <class A, int V>
__device__ __forceinline__ void load_neighbours(const A* from, A (&to)[V]) {
  constexpr int kPiece = V < kWide<A> ? V : kWide<A>;
#pragma unroll
  for (int i = 0; i < V; i += kPiece) {
    const Vector<A, kPiece> piece = load_vector<A, kPiece>(from + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j)
      to[i + j] = piece.at[j];
  }
}

// Streams of planes, contiguous: channels first, first + ways, ... below `end` of tile after tile.
template <class T, int V, int N, int Slots>
class PlaneStream {
public:
  using Ring = VectorRing<T, V, N, Slots>;

  __device__ __forceinline__ PlaneStream(
      Ring& ring,
      const T* const (&bases)[N],
      const PlanePlace& place,
      const PixelOf& pixel_of,
      const Share& tiles,
      int first,
      int end,
      int ways
  )
      : ring_(ring), place_(place), pixel_of_(pixel_of), tile_(tiles.begin), tiles_(tiles.end),
        first_(first), end_(end), ways_(ways), step_(ways * place.pixels) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      bases_[n] = bases[n];
    ring_.restart();
    begin_tile();
#pragma unroll 1
    for (int i = 0; i < Ring::kAhead; ++i)
      advance();
  }

  // offset: of the vectors, read where they are not copied ahead.
  __device__ __forceinline__ void take(int64_t offset, Vector<T, V> (&out)[N]) {
    const T* from[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      from[n] = bases_[n] + offset;
    ring_.take(from, out);
  }

  __device__ __forceinline__ void advance() {
    ring_.ahead(ahead_, valid_);
    channel_ += ways_;
#pragma unroll
    for (int n = 0; n < N; ++n)
      ahead_[n] += step_;
    if (channel_ >= end_) {
      ++tile_;
      begin_tile();
    }
  }

private:
  __device__ __forceinline__ void begin_tile() {
    channel_ = first_;
    const int64_t base = tile_ < tiles_ ? place_.base(pixel_of_, tile_) : -1;
    valid_ = base >= 0 && first_ < end_;
#pragma unroll
    for (int n = 0; n < N; ++n)
      ahead_[n] = bases_[n] + (base + first_ * place_.pixels);
  }

  Ring& ring_;
  const PlanePlace& place_;
  const PixelOf& pixel_of_;
  const T* bases_[N];
  const T* ahead_[N];
  int64_t tile_, tiles_;
  int first_, end_, ways_, channel_;
  int64_t step_;
  bool valid_;
};

}  // namespace dcconv::cuda
