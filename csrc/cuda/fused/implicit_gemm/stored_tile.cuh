// A tile in 16 bits on its way between shared memory and a tensor: fragments are read and written
// in pairs of neighbouring columns, the tensor in pieces of 16 bytes.
#pragma once

#include "cuda/fused/implicit_gemm/problem.cuh"
#include "cuda/support/async_copy.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

// Where the tile lies in tensors of `channels` channels, in halves of its rows, and what of it
// exists.
template <class T, class Tile>
class StoredTile {
public:
  static constexpr int kVectors = Tile::kColumns / kPiece;
  static constexpr int kStride = Tile::kThreads / kVectors;
  static constexpr int kHalfRows = Tile::kRows / 2;
  static constexpr int kHalfBytes = kHalfRows * Tile::kColumns * 2;
  static_assert(kHalfRows % kStride == 0 && kHalfBytes <= Tile::kStageBytes, "half in a stage");

  __device__ __forceinline__ StoredTile(const GemmPlace<Tile>& place, int columns, int channels)
      : vector(static_cast<int>(threadIdx.x) % kVectors),
        first_row(static_cast<int>(threadIdx.x) / kVectors),
        rows(place.first_column + vector * kPiece < columns ? place.rows : 0),
        step(int64_t(kStride) * channels),
        offset(
            (place.first_row + first_row) * channels + int64_t(place.group) * columns +
            place.first_column + vector * kPiece
        ) {}

  // From shared memory, whole when all threads have met, to the tensor.
  __device__ __forceinline__ void
  copy(const unsigned char* first_half, const unsigned char* second_half, T* tensor) const {
    T* out = tensor + offset;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kStride; ++i) {
      const int half = i * kStride / kHalfRows;
      const int row = first_row + i * kStride;
      const unsigned char* piece = (half == 0 ? first_half : second_half) +
                                   swizzled<kVectors>(row - half * kHalfRows, vector) * 16;
      // Read in any case: no branch around both.
      const Vector<T, kPiece> v = load_vector<T, kPiece>(reinterpret_cast<const T*>(piece));
      if (row < rows)
        store_vector(out + i * step, v);
    }
  }

  // Copies of a half from the tensor to shared memory.
  __device__ __forceinline__ void fetch(const T* tensor, int half, unsigned char* shared) const {
    const T* in = tensor + offset + half * (kHalfRows / kStride) * step;
#pragma unroll
    for (int i = 0; i < kHalfRows / kStride; ++i) {
      const int row = first_row + i * kStride;
      const bool valid = half * kHalfRows + row < rows;
      copy_async(
          shared + swizzled<kVectors>(row, vector) * 16, valid ? in + i * step : tensor, valid
      );
    }
  }

  int vector, first_row;  // the thread's piece of a row, and the first of its rows
  int rows;               // that exist
  int64_t step, offset;   // elements between its rows; before its first piece
};

}  // namespace dcconv::cuda
