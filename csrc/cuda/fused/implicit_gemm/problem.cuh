// The matrix product behind a convolution: rows are positions of the result, columns its channels,
// the depth runs over the taps of the window (outside) and the channels of what is read (inside).
// Forward, x is read and gives u; for the gradient at stride 1, the gradient of u gives that of x.
#pragma once

#include "cuda/fused/implicit_gemm/tile.cuh"
#include "cuda/support/window.cuh"

namespace dcconv::cuda {

// One axis: result index i and tap r read index i * stride + origin + r * step, zero outside.
struct GatherAxis {
  int size;
  int taps;
  int stride, origin, step;
};

// Whether there is a pixel.
__device__ __forceinline__ bool inside(const GatherAxis& axis, int i) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(axis.size);
}

// A tile's windows see pixels from this many before its first row on; reach: how many more than it
// has rows, or more than a halo holds.
struct HaloReach {
  int low = 0, reach = 0;
};

// Pixels of a halo, and taps that share it: halo.cuh.
constexpr int kHaloRows = 256, kHaloTaps = 9;

inline HaloReach halo_reach(const GatherAxis& vertical, const GatherAxis& horizontal) {
  const auto low = [](const GatherAxis& axis) {
    return int64_t(axis.origin) + (axis.step < 0 ? int64_t(axis.step) * (axis.taps - 1) : 0);
  };
  const auto reach = [](const GatherAxis& axis) {
    return (axis.step < 0 ? -int64_t(axis.step) : axis.step) * (axis.taps - 1);
  };
  const int64_t size = horizontal.size, limit = kHaloRows;
  const int64_t first = low(vertical) * size + low(horizontal);
  const int64_t more = reach(vertical) * size + reach(horizontal);
  const bool near = more < limit && -limit < first && first < limit;
  return near ? HaloReach{static_cast<int>(first), static_cast<int>(more)}
              : HaloReach{0, kHaloRows};
}

struct GemmProblem {
  const void* pixels;  // T [images, vertical.size, horizontal.size, groups * depth]
  // T [o, taps, c / groups]: filters are the columns and channels the depth forward; the other way
  // round for the gradient.
  const void* weight;
  int64_t rows;
  int columns, depth, groups;  // of one group: columns and depth, multiples of 8
  GatherAxis vertical, horizontal;
  PixelOf pixel_of;  // of a row
  bool same_size;    // of the result and what is read
  HaloReach halo;

  // Whether a tile of so many rows can read its windows from a halo.
  bool takes_halo(int tile_rows) const {
    return vertical.taps == 3 && horizontal.taps == 3 && vertical.stride == 1 &&
           horizontal.stride == 1 && same_size && tile_rows + halo.reach <= kHaloRows;
  }
  // Of those: pixels from a row's own to the one that a tap reads.
  __device__ __forceinline__ int halo_offset(int tap) const {
    const int y = vertical.origin + tap / 3 * vertical.step;
    return y * horizontal.size + horizontal.origin + tap % 3 * horizontal.step;
  }
  // A bit for each tap that finds its pixel inside of the image.
  __device__ __forceinline__ uint32_t taps_seen(int64_t row) const {
    const Pixel at = pixel_of(row);
    uint32_t columns = 0, taps = 0;
    int x = at.x + horizontal.origin, y = at.y + vertical.origin;
#pragma unroll
    for (int s = 0; s < 3; ++s, x += horizontal.step)
      columns |= static_cast<uint32_t>(inside(horizontal, x)) << s;
#pragma unroll
    for (int r = 0; r < 3; ++r, y += vertical.step)
      taps |= inside(vertical, y) ? columns << 3 * r : 0;
    return taps;
  }
};

inline GemmProblem forward_problem(const FusedParams& p) {
  const auto axis = [](const WindowAxis& w) {
    return GatherAxis{w.input, w.kernel, w.stride, -w.before, w.dilation};
  };
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  return {
      p.x,
      p.weight,
      p.n * rows.output * columns.output,
      p.o / p.groups,
      p.c / p.groups,
      p.groups,
      axis(rows),
      axis(columns),
      PixelOf(p.n, rows.output, columns.output),
      rows.output == rows.input && columns.output == columns.input,
      halo_reach(axis(rows), axis(columns))
  };
}

// At stride 1: input i is seen by output i + before - r * dilation through tap r.
inline GemmProblem gradient_problem(const FusedGradInputParams& p) {
  const auto axis = [](const WindowAxis& w) {
    return GatherAxis{w.output, w.kernel, 1, w.before, -w.dilation};
  };
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  return {
      p.grad_u,
      p.weight,
      p.n * rows.input * columns.input,
      p.c / p.groups,
      p.o / p.groups,
      p.groups,
      axis(rows),
      axis(columns),
      PixelOf(p.n, rows.input, columns.input),
      rows.output == rows.input && columns.output == columns.input,
      halo_reach(axis(rows), axis(columns))
  };
}

// Whether 32 bits hold what kernels count in 16-byte pieces: offsets in the images that one tile
// sees, from the first of them on and as far outside as a window reaches, and offsets in the
// weight.
inline bool offsets_fit(const GemmProblem& p, int64_t outputs) {
  const int64_t limit = int64_t(1) << 31;
  const auto reach = [](const GatherAxis& axis) {
    const int64_t origin = axis.origin < 0 ? -int64_t(axis.origin) : axis.origin;
    const int64_t step = axis.step < 0 ? -int64_t(axis.step) : axis.step;
    return axis.size + 2 * (origin + step * axis.taps);
  };
  const int64_t images = 128 / outputs + 2, channels = int64_t(p.depth) * p.groups / kPiece;
  const int64_t taps = int64_t(p.vertical.taps) * p.horizontal.taps;
  return reach(p.vertical) < limit / images && reach(p.horizontal) < limit / channels &&
         images * reach(p.vertical) < limit / (reach(p.horizontal) * channels) &&
         taps < limit / p.columns && (channels + 128) * taps * (p.columns + 128) < limit;
}

// Neighbouring blocks are column tiles of the same rows: what they read of `pixels` stays in L2.
struct GemmGrid {
  int64_t blocks;
  Divider per_rows;  // blocks of a row tile, groups outside
  Divider per_group;
};

template <class Tile>
GemmGrid gemm_grid(const GemmProblem& p) {
  const int64_t per_group = ceil_div(p.columns, Tile::kColumns), per_rows = per_group * p.groups;
  return {
      per_rows * ceil_div(p.rows, Tile::kRows),
      Divider(static_cast<uint32_t>(per_rows)),
      Divider(static_cast<uint32_t>(per_group))
  };
}

// What one block computes: rows from first_row and columns from first_column of a group.
template <class Tile>
struct GemmPlace {
  int64_t first_row;
  int rows;  // that exist, of the tile's
  int group, first_column;

  __device__ __forceinline__ GemmPlace(const GemmProblem& p, const GemmGrid& grid) {
    const uint32_t block = blockIdx.x;
    const uint32_t row_tile = grid.per_rows.divide(block);
    const uint32_t rest = block - row_tile * grid.per_rows.divisor();
    const uint32_t g = grid.per_group.divide(rest);
    first_row = int64_t(row_tile) * Tile::kRows;
    rows = static_cast<int>(at_most(int64_t(Tile::kRows), p.rows - first_row));
    group = static_cast<int>(g);
    first_column = static_cast<int>(rest - g * grid.per_group.divisor()) * Tile::kColumns;
  }
};

}  // namespace dcconv::cuda
