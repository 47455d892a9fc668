// Copies of one step's operands into a stage of shared memory, 16 bytes at a time and zeros where
// nothing is: padding, and the tails of rows, columns and depth.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/implicit_gemm/problem.cuh"

namespace dcconv {
namespace cuda {

// Elements of a 16-byte piece: storage types have 16 bits here.
constexpr int kPiece = 8;

// A step of the depth: a tap and Depth channels from `channel` on.
template <int Depth>
struct GemmStep {
  int tap = 0, column = 0, channel = 0;
  int y = 0, x = 0;  // from a row's origin to the pixel that the tap reads

  __device__ __forceinline__ void advance(const GemmProblem& p) {
    channel += Depth;
    if (channel < p.depth)
      return;
    channel = 0;
    ++tap;
    x += p.horizontal.step;
    if (++column < p.horizontal.taps)
      return;
    column = x = 0;
    y += p.vertical.step;
  }
};

// Rows outside of the product begin so far from the image that no tap reaches it.
constexpr int kNowhere = -(1 << 30);

// Pixels as [rows, depth]: the same piece of every kStride-th row per thread.
template <class T, class Tile>
class PixelLoader {
public:
  static constexpr int kPieces = Tile::kDepth / kPiece;
  static constexpr int kStride = Tile::kThreads / kPieces;
  static constexpr int kCount = Tile::kRows / kStride;
  static_assert(kStride % 8 == 0 && kCount * kStride == Tile::kRows, "one swizzle per thread");

  __device__ __forceinline__ PixelLoader(const GemmProblem& p, const GemmPlace<Tile>& place)
      : channel_(static_cast<int>(threadIdx.x) % kPieces * kPiece) {
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    place_ = swizzled<kPieces>(row, channel_ / kPiece) * 16;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int own = row + i * kStride;
      y_[i] = x_[i] = kNowhere;
      offset_[i] = 0;
      if (own < place.rows) {
        const Pixel at = p.pixel_of(place.first_row + own);
        y_[i] = at.y * p.vertical.stride + p.vertical.origin;
        x_[i] = at.x * p.horizontal.stride + p.horizontal.origin;
        const int64_t pixel = (at.image * p.vertical.size + y_[i]) * p.horizontal.size + x_[i];
        offset_[i] = (pixel * p.groups + place.group) * p.depth + channel_;
      }
    }
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, const GemmStep<Tile::kDepth>& step, unsigned char* stage) const {
    const T* pixels = static_cast<const T*>(p.pixels);
    const bool in_depth = step.channel + channel_ < p.depth;
    const int64_t offset =
        (int64_t(step.y) * p.horizontal.size + step.x) * p.groups * p.depth + step.channel;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid =
          in_depth &&
          static_cast<unsigned>(y_[i] + step.y) < static_cast<unsigned>(p.vertical.size) &&
          static_cast<unsigned>(x_[i] + step.x) < static_cast<unsigned>(p.horizontal.size);
      copy_async<16>(
          stage + place_ + i * (kStride * kPieces * 16),
          valid ? pixels + (offset_[i] + offset) : pixels,
          valid
      );
    }
  }

private:
  int channel_, place_;
  int y_[kCount], x_[kCount];
  int64_t offset_[kCount];
};

// Forward: the weight as [columns, depth], each a filter's channels.
template <class T, class Tile>
class FilterLoader {
public:
  static constexpr int kPieces = Tile::kDepth / kPiece;
  static constexpr int kStride = Tile::kThreads / kPieces;
  static constexpr int kCount = Tile::kColumns / kStride;
  static_assert(kStride % 8 == 0 && kCount * kStride == Tile::kColumns, "one swizzle per thread");

  __device__ __forceinline__ FilterLoader(const GemmProblem& p, const GemmPlace<Tile>& place)
      : channel_(static_cast<int>(threadIdx.x) % kPieces * kPiece),
        column_(place.first_column + static_cast<int>(threadIdx.x) / kPieces) {
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    place_ = swizzled<kPieces>(row, channel_ / kPiece) * 16;
    filter_ = int64_t(p.vertical.taps) * p.horizontal.taps * p.depth;
    offset_ = (int64_t(place.group) * p.columns + column_) * filter_ + channel_;
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, const GemmStep<Tile::kDepth>& step, unsigned char* stage) const {
    const T* weight = static_cast<const T*>(p.weight);
    const bool in_depth = step.channel + channel_ < p.depth;
    const int64_t offset = offset_ + int64_t(step.tap) * p.depth + step.channel;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = in_depth && column_ + i * kStride < p.columns;
      copy_async<16>(
          stage + place_ + i * (kStride * kPieces * 16),
          valid ? weight + (offset + i * kStride * filter_) : weight,
          valid
      );
    }
  }

private:
  int channel_, column_, place_;
  int64_t filter_, offset_;
};

// Gradient: the weight as [depth, columns], each a filter's channels. The fragments are transposed
// where they are read.
template <class T, class Tile>
class TransposedFilterLoader {
public:
  static constexpr int kPieces = Tile::kColumns / kPiece;
  static constexpr int kStride = Tile::kThreads / kPieces;
  static constexpr int kCount = Tile::kDepth / kStride;
  static_assert(kStride % 8 == 0 && kCount * kStride == Tile::kDepth, "one swizzle per thread");

  __device__ __forceinline__
  TransposedFilterLoader(const GemmProblem& p, const GemmPlace<Tile>& place)
      : filter_(static_cast<int>(threadIdx.x) / kPieces) {
    const int column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
    place_ = swizzled<kPieces>(filter_, column / kPiece) * 16;
    in_columns_ = place.first_column + column < p.columns;
    size_ = int64_t(p.vertical.taps) * p.horizontal.taps * p.columns;
    offset_ = (int64_t(place.group) * p.depth + filter_) * size_ + place.first_column + column;
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, const GemmStep<Tile::kDepth>& step, unsigned char* stage) const {
    const T* weight = static_cast<const T*>(p.weight);
    const int64_t offset = offset_ + step.channel * size_ + int64_t(step.tap) * p.columns;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = in_columns_ && step.channel + filter_ + i * kStride < p.depth;
      copy_async<16>(
          stage + place_ + i * (kStride * kPieces * 16),
          valid ? weight + (offset + i * kStride * size_) : weight,
          valid
      );
    }
  }

private:
  int filter_, place_;
  bool in_columns_;
  int64_t size_, offset_;
};

}  // namespace cuda
}  // namespace dcconv
