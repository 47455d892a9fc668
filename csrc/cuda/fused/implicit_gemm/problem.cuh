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

struct GemmProblem {
  const void* pixels;  // T [images, vertical.size, horizontal.size, groups * depth]
  // T [o, taps, c / groups]: filters are the columns and channels the depth forward; the other way
  // round for the gradient.
  const void* weight;
  int64_t rows;
  int columns, depth, groups;  // of one group: columns and depth, multiples of 8
  GatherAxis vertical, horizontal;
  PixelOf pixel_of;  // of a row
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
      PixelOf(p.n, rows.output, columns.output)
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
      PixelOf(p.n, rows.input, columns.input)
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
