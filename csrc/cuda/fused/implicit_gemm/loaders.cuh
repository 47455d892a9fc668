// Copies of one step's operands into a stage of shared memory, 16 bytes at a time and zeros where
// nothing is: padding, and the tails of rows, columns and depth.
#pragma once

#include "cuda/fused/implicit_gemm/problem.cuh"
#include "cuda/support/async_copy.cuh"

namespace dcconv::cuda {

// A step of the depth: a tap and Depth channels from `channel` on.
template <int Depth>
struct GemmStep {
  int tap = 0, column = 0, channel = 0;
  int y = 0, x = 0;  // from a row's origin to the pixel that the tap reads

  // Channels inside, taps outside; whether another tap begins.
  __device__ __forceinline__ bool advance(const GemmProblem& p) {
    channel += Depth;
    if (channel < p.depth)
      return false;
    channel = 0;
    ++tap;
    x += p.horizontal.step;
    if (++column < p.horizontal.taps)
      return true;
    column = x = 0;
    y += p.vertical.step;
    return true;
  }
};

// Rows outside of the product begin so far from the image that no tap reaches it.
constexpr int kNowhere = -(1 << 30);

// Pixels as [rows, depth]: the same piece of every kStride-th row per thread. Offsets are in pieces
// from the tile's first image on; offsets_fit bounds them. What a tap sees is found once per tap:
// copies of a step are three instructions each. OneTap: a 1x1 window without padding.
template <class T, class Tile, bool OneTap>
class PixelLoader {
public:
  static constexpr int kPieces = Tile::kDepth / kPiece;
  static constexpr int kStride = Tile::kThreads / kPieces;
  static constexpr int kCount = Tile::kRows / kStride;
  static_assert(kStride % 8 == 0 && kCount * kStride == Tile::kRows, "one swizzle per thread");
  static_assert(kCount <= 32, "a bit for each row");

  __device__ __forceinline__ PixelLoader(const GemmProblem& p, const GemmPlace<Tile>& place)
      : piece_(static_cast<int>(threadIdx.x) % kPieces) {
    const int first = static_cast<int>(threadIdx.x) / kPieces;
    const int width = p.groups * p.depth / kPiece;  // of a pixel
    place_ = swizzled<kPieces>(first, piece_) * 16;
    const int64_t first_image = p.pixel_of(place.first_row).image;
    image_ = static_cast<const T*>(p.pixels) +
             first_image * p.vertical.size * p.horizontal.size * width * kPiece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first + i * kStride;
      y_[i] = x_[i] = kNowhere;
      offset_[i] = 0;
      if (row < place.rows) {
        const Pixel at = p.pixel_of(place.first_row + row);
        const int image = static_cast<int>(at.image - first_image);
        y_[i] = at.y * p.vertical.stride + p.vertical.origin;
        x_[i] = at.x * p.horizontal.stride + p.horizontal.origin;
        const int pixel = (image * p.vertical.size + y_[i]) * p.horizontal.size + x_[i];
        offset_[i] = pixel * width + place.group * (p.depth / kPiece) + piece_;
      }
    }
    see(p, GemmStep<Tile::kDepth>());
  }

  // Another tap than before.
  __device__ __forceinline__ void see(const GemmProblem& p, const GemmStep<Tile::kDepth>& step) {
    tap_ = (step.y * p.horizontal.size + step.x) * (p.groups * p.depth / kPiece);
    valid_ = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid =
          OneTap ? y_[i] >= 0
                 : inside(p.vertical, y_[i] + step.y) && inside(p.horizontal, x_[i] + step.x);
      valid_ |= static_cast<uint32_t>(valid) << i;
    }
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, const GemmStep<Tile::kDepth>& step, unsigned char* stage) const {
    const uint32_t valid = step.channel + piece_ * kPiece < p.depth ? valid_ : 0;
    const int offset = tap_ + step.channel / kPiece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copy_async(
          stage + place_ + i * (kStride * kPieces * 16),
          image_ + int64_t(offset_[i] + offset) * kPiece,
          (valid >> i & 1) != 0
      );
    }
  }

private:
  const T* image_;
  int piece_, place_;
  int y_[kCount], x_[kCount], offset_[kCount];
  int tap_;
  uint32_t valid_;  // by row, under the present tap
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
      : piece_(static_cast<int>(threadIdx.x) % kPieces), valid_(0) {
    const int first = static_cast<int>(threadIdx.x) / kPieces;
    place_ = swizzled<kPieces>(first, piece_) * 16;
    filter_ = p.vertical.taps * p.horizontal.taps * (p.depth / kPiece);
    offset_ = (place.group * p.columns + place.first_column + first) * filter_ + piece_;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      valid_ |= static_cast<uint32_t>(place.first_column + first + i * kStride < p.columns) << i;
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, int tap, int channel, unsigned char* stage) const {
    const T* weight = static_cast<const T*>(p.weight);
    const uint32_t valid = channel + piece_ * kPiece < p.depth ? valid_ : 0;
    const int offset = offset_ + tap * (p.depth / kPiece) + channel / kPiece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copy_async(
          stage + place_ + i * (kStride * kPieces * 16),
          weight + int64_t(offset + i * kStride * filter_) * kPiece,
          (valid >> i & 1) != 0
      );
    }
  }

private:
  int piece_, place_;
  int filter_, offset_;  // pieces of a filter; pieces before the thread's first
  uint32_t valid_;       // by column
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
  TransposedFilterLoader(const GemmProblem& p, const GemmPlace<Tile>& place) {
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    place_ = swizzled<kPieces>(row, piece) * 16;
    rows_ = place.first_column + piece * kPiece < p.columns ? p.depth - row : 0;
    filter_ = p.vertical.taps * p.horizontal.taps * (p.columns / kPiece);
    offset_ = (place.group * p.depth + row) * filter_ + place.first_column / kPiece + piece;
  }

  __device__ __forceinline__ void
  load(const GemmProblem& p, int tap, int channel, unsigned char* stage) const {
    const T* weight = static_cast<const T*>(p.weight);
    const int offset = offset_ + channel * filter_ + tap * (p.columns / kPiece);
    const int rows = rows_ - channel;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copy_async(
          stage + place_ + i * (kStride * kPieces * 16),
          weight + int64_t(offset + i * kStride * filter_) * kPiece,
          i * kStride < rows
      );
    }
  }

private:
  int place_;
  int filter_, offset_;  // pieces of a filter; pieces before the thread's first
  int rows_;             // from the thread's first on, 0 outside of the columns
};

}  // namespace dcconv::cuda
