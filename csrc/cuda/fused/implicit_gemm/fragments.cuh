// Where the product's fragments of a thread lie in the tile: pairs of neighbouring columns, in rows
// m * 16 + half * 8 and columns n * 8 from the thread's first on. What shared memory holds of them
// is found from there by constants, but for one exclusive or for each n.
#pragma once

#include "cuda/fused/implicit_gemm/tile.cuh"

namespace dcconv::cuda {

// Halves of eight columns lie apart in arrays over columns, so that eight lanes with 16 bytes each
// cover the banks once.
template <int Columns>
__host__ __device__ __forceinline__ int column_place(int vector, int half) {
  return (half * (Columns / kPiece) + vector) * (kPiece / 2);
}

template <class Tile>
class FragmentPlace {
public:
  __device__ __forceinline__ FragmentPlace() {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    row_ = lane / 4;
    pair_ = lane % 4;
  }

  __device__ __forceinline__ static int warp_row() {
    return static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpColumns;
  }
  __device__ __forceinline__ static int warp_column() {
    return static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpColumns;
  }

  __device__ __forceinline__ int row(int m, int half) const {
    return (warp_row() * Tile::kRowFragments + m) * 16 + half * 8 + row_;
  }
  // The first of the pair.
  __device__ __forceinline__ int column(int n) const {
    return (warp_column() * Tile::kColumnFragments + n) * 8 + pair_ * 2;
  }

  // The pair's numbers of an array over columns.
  __device__ __forceinline__ const float* columns(const float* array, int n) const {
    return array + column_place<Tile::kColumns>(warp_column() * Tile::kColumnFragments, pair_ / 2) +
           pair_ % 2 * 2 + n * (kPiece / 2);
  }

  // The pair in a 16-bit tile, [rows, columns] in swizzled pieces, or in what is left of it without
  // the first `before` rows, a multiple of eight.
  __device__ __forceinline__ uint32_t*
  pair(unsigned char* tile, int m, int n, int half, int before = 0) const {
    constexpr int kPieces = Tile::kColumns / kPiece;
    const int first_row = warp_row() * (Tile::kRowFragments * 16) - before;
    // Rows that are eight apart have one swizzle.
    const int piece =
        first_row * kPieces + swizzled<kPieces>(row_, warp_column() * Tile::kColumnFragments + n);
    return reinterpret_cast<uint32_t*>(
        tile + piece * 16 + pair_ * 4 + (m * 16 + half * 8) * (kPieces * 16)
    );
  }

private:
  int row_, pair_;
};

}  // namespace dcconv::cuda
