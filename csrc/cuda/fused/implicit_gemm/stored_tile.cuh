// A tile in 16 bits on its way between shared memory and a tensor: fragments are read and written
// in pairs of neighbouring columns, the tensor in pieces of 16 bytes.
#pragma once

#include "cuda/fused/implicit_gemm/problem.cuh"
#include "cuda/support/async_copy.cuh"
#include "cuda/support/packed.cuh"

namespace dcconv::cuda {

// Where the tile lies in tensors of `channels` channels, in quarters of its rows, and what
// of it exists.
template <class T, class Tile>
class StoredTile {
public:
  static constexpr int kVectors = Tile::kColumns / kPiece;
  static constexpr int kStride = Tile::kThreads / kVectors;
  static constexpr int kQuarterRows = Tile::kRows / 4;
  static constexpr int kOfQuarter = kQuarterRows / kStride;  // pieces of a thread
  static_assert(kQuarterRows % kStride == 0 && kStride % 8 == 0, "one swizzle per thread");

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
  __device__ __forceinline__ void copy(unsigned char* const (&quarters)[4], T* tensor) const {
    T* out = tensor + offset;
    const auto load = [&](int quarter, int row) {
      return load_vector<T, kPiece>(reinterpret_cast<const T*>(
          quarters[quarter] + swizzled<kVectors>(first_row + row, vector) * 16
      ));
    };
    // Whole tiles without a test at each row, which would await one load after the other.
    if (rows == Tile::kRows) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        Vector<T, kPiece> v[kOfQuarter];
#pragma unroll
        for (int i = 0; i < kOfQuarter; ++i)
          v[i] = load(quarter, i * kStride);
#pragma unroll
        for (int i = 0; i < kOfQuarter; ++i, out += step)
          store_vector(out, v[i]);
      }
      return;
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll 1
      for (int row = 0; row < kQuarterRows; row += kStride, out += step) {
        if (quarter * kQuarterRows + first_row + row < rows)
          store_vector(out, load(quarter, row));
      }
    }
  }

  // The same of a tile whose quarters follow each other.
  __device__ __forceinline__ void copy(unsigned char* shared, T* tensor) const {
    unsigned char* const quarters[4] = {
        shared,
        shared + kQuarterBytes<Tile>,
        shared + 2 * kQuarterBytes<Tile>,
        shared + 3 * kQuarterBytes<Tile>
    };
    copy(quarters, tensor);
  }

  // Copies of a quarter from the tensor to shared memory.
  __device__ __forceinline__ void fetch(const T* tensor, int quarter, unsigned char* shared) const {
    const T* in = tensor + offset + quarter * kOfQuarter * step;
#pragma unroll
    for (int i = 0; i < kOfQuarter; ++i) {
      const int row = first_row + i * kStride;
      const bool valid = quarter * kQuarterRows + row < rows;
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
