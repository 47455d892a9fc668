// Tiles of the implicit GEMM, how their operands lie in shared memory, and which tile a problem
// gets.
#pragma once

#include "cuda/support/device.cuh"
#include "cuda/support/launch.cuh"

namespace dcconv::cuda {

// Elements of a 16-byte piece: storage types have 16 bits here.
constexpr int kPiece = 8;

// A block computes Rows x Columns elements of the product in steps of Depth; each of its WarpRows x
// WarpColumns warps an equal part of them. Stages: steps whose operands are in shared memory or on
// their way. Blocks: how many share a multiprocessor, by its registers. Warps compute 64x64
// elements where a tile has room for two of them: then shared memory is read less often than tensor
// cores multiply, in 384 of 410 cycles of a step of 128x128 on an H200, where 64x32 takes 512.
template <int Rows, int Columns, int Depth, int WarpRows, int WarpColumns, int Stages, int Blocks>
struct GemmTile {
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = Depth;
  static constexpr int kWarpRows = WarpRows, kWarpColumns = WarpColumns;
  static constexpr int kStages = Stages, kBlocks = Blocks;
  static constexpr int kThreads = kWarp * WarpRows * WarpColumns;
  // Fragments of a warp: 16 rows each, 8 columns each.
  static constexpr int kRowFragments = Rows / WarpRows / 16;
  static constexpr int kColumnFragments = Columns / WarpColumns / 8;
  // Bytes in shared memory: of x and the weight of one stage, and of the product in float32, which
  // takes the place of the operands.
  static constexpr int kPixelBytes = Rows * Depth * 2, kWeightBytes = Columns * Depth * 2;
  static constexpr int kStageBytes = kPixelBytes + kWeightBytes;
  static constexpr int kProductBytes = Rows * Columns * 4;
  static_assert(Stages >= 2 && Depth % 16 == 0, "a pipeline of whole products");
  static_assert(kRowFragments * 16 * WarpRows == Rows, "whole fragments");
  static_assert(kColumnFragments * 8 * WarpColumns == Columns, "whole fragments");
  static_assert(kColumnFragments % 2 == 0, "fragments of the weight are read in pairs");
  static_assert(Columns <= kThreads, "a thread per column");
};

// Configurations by number. None has been measured on a GPU.
using WideTile = GemmTile<128, 128, 32, 2, 2, 4, 2>;
using TallTile = GemmTile<128, 64, 32, 2, 1, 3, 4>;
using SmallTile = GemmTile<64, 64, 32, 2, 2, 4, 4>;

template <class F>
void with_gemm_tile(int tile, F&& f) {
  switch (tile) {
  case 0:
    return f(WideTile{});
  case 1:
    return f(TallTile{});
  default:
    return f(SmallTile{});
  }
}

constexpr int kGemmTiles = 3;

// The tile of a product with `rows` rows and `groups` times `columns` columns: the largest that
// leaves no half of itself empty and has a block for every place on the device.
inline int gemm_tile(int64_t rows, int64_t columns, int64_t groups, int64_t places) {
  const bool wide = (columns + 127) / 128 * 128 == (columns + 63) / 64 * 64;
  const auto blocks = [&](int64_t tile_rows, int64_t tile_columns) {
    return ceil_div(rows, tile_rows) * ceil_div(columns, tile_columns) * groups;
  };
  if (wide && blocks(128, 128) >= places)
    return 0;
  return blocks(128, 64) >= places ? 1 : 2;
}

// A quarter of a tile of 16-bit elements lies together.
template <class Tile>
constexpr int kQuarterBytes = Tile::kRows / 4 * Tile::kColumns * 2;

// Where 16-byte piece `piece` of a row lies, in pieces, in an operand whose rows have Pieces
// pieces. Eight neighbouring rows at one piece (ldmatrix), and eight neighbouring pieces of whole
// rows (the copies), each cover the 32 banks once.
template <int Pieces>
__host__ __device__ __forceinline__ int swizzled(int row, int piece) {
  static_assert(Pieces == 4 || Pieces % 8 == 0, "rows of 64 or a multiple of 128 bytes");
  return row * Pieces + (piece ^ (Pieces == 4 ? (row >> 1) & 3 : row & 7));
}

// The same for the product in float32, in pieces of four: written in pairs of columns by four lanes
// in each of four rows, read in runs of eight columns.
template <int Columns>
__host__ __device__ __forceinline__ int product_swizzled(int row, int piece) {
  return row * (Columns / 4) + (piece ^ ((row & 3) << 1 | (piece >> 3 & 1)));
}

}  // namespace dcconv::cuda
