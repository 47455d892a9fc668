// Dot products and norms of windows of kKernel columns, neighbours in a row of outputs, in
// registers from x as it lies in memory: every pixel is loaded once per row of the kernel, and
// squared once.
#pragma once

#include "cpu/kernels/pixels.h"

namespace dcconv::cpu::DCCONV_ISA {

// Outputs of a run: with their columns of squares and a row of weights they fill 32 registers; runs
// of 16 registers are shorter. Sizes of images of common networks are multiples of 7.
constexpr int kLongRun = DCCONV_LANES == 16 ? 7 : 3;
constexpr int kShortRun = DCCONV_LANES == 16 ? 4 : 2;

template <class T, class A>
struct Window {
  const T* const* const* rows;  // [kernel rows][columns]: pixels, or zeros
  A* const* squares;            // [kernel rows]: sums of squares of kKernel columns, ring of rows
  const A* weights;             // [kernel rows, kernel columns, lanes]
  int64_t kernel_rows;          // those that show a row of x
  int64_t known_rows;           // the first ones, whose squares are in the ring
  int64_t column;               // the first one
  int64_t channel;              // the first lane's
  int64_t square;               // the first output's place in a row of the ring
  A eps;
};

// pixels[0] is the run's first one. The compiler must not see where it comes from: it would keep an
// offset for every column and no registers for anything else.
template <class T>
DC_HD const T* const* columns_from(const T* const* row, int64_t column) {
  const T* const* pixels = row + column;
  asm("" : "+r"(pixels));
  return pixels;
}

// A row of the kernel.
template <class T, class A, int kKernel, int kStride, int kRun>
DC_HD void row_dots(
    const T* const* pixels,
    int64_t channel,
    const A* weights,
    typename Lanes<A>::Vector (&dots)[kRun]
) {
  using Vector = typename Lanes<A>::Vector;
  Vector w[kKernel];
#pragma GCC unroll 8
  for (int t = 0; t < kKernel; ++t)
    load_vector<A>(w[t], weights + t * Lanes<A>::count);
#pragma GCC unroll 32
  for (int j = 0; j < (kRun - 1) * kStride + kKernel; ++j) {
    Vector v;
    load_pixels<A>(v, pixels[j] + channel);
#pragma GCC unroll 8
    for (int i = 0; i < kRun; ++i) {
      const int t = j - i * kStride;
      if (t >= 0 && t < kKernel)
        dots[i] += v * w[t];
    }
  }
}

// Row by row in one order, wherever a run or a task begins: neighbours agree bit for bit.
template <class T, class A, int kKernel, int kStride, int kRun>
DC_HD void row_squares(
    const T* const* pixels, int64_t channel, A* squares, typename Lanes<A>::Vector (&sums)[kRun]
) {
  using Vector = typename Lanes<A>::Vector;
  Vector row[kRun];
#pragma GCC unroll 32
  for (int j = 0; j < (kRun - 1) * kStride + kKernel; ++j) {
    Vector v;
    load_pixels<A>(v, pixels[j] + channel);
    const Vector square = v * v;
#pragma GCC unroll 8
    for (int i = 0; i < kRun; ++i) {
      const int t = j - i * kStride;
      if (t == 0)
        row[i] = square;
      if (t > 0 && t < kKernel)
        row[i] += square;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRun; ++i) {
    store_vector<A>(squares + i * Lanes<A>::count, row[i]);
    sums[i] += row[i];
  }
}

// sums[i]: eps + sum of squares of the window of output i; with kDot also dots[i].
template <class T, class A, int kKernel, int kStride, int kRun, bool kDot>
DC_HD void window_sums(
    const Window<T, A>& p,
    int64_t lane,
    typename Lanes<A>::Vector (&dots)[kRun],
    typename Lanes<A>::Vector (&sums)[kRun]
) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t lanes = Lanes<A>::count;
#pragma GCC unroll 8
  for (int i = 0; i < kRun; ++i) {
    dots[i] = Vector{};
    sums[i] = Vector{} + p.eps;
  }
  const A* weights = p.weights + lane;
  const int64_t channel = p.channel + lane;
  for (int64_t r = 0; r < p.known_rows; ++r) {
    const A* squares = p.squares[r] + p.square + lane;
#pragma GCC unroll 8
    for (int i = 0; i < kRun; ++i) {
      Vector row;
      load_vector<A>(row, squares + i * lanes);
      sums[i] += row;
    }
    if constexpr (kDot)
      row_dots<T, A, kKernel, kStride>(
          columns_from(p.rows[r], p.column), channel, weights + r * kKernel * lanes, dots
      );
  }
  for (int64_t r = p.known_rows; r < p.kernel_rows; ++r) {
    const T* const* pixels = columns_from(p.rows[r], p.column);
    row_squares<T, A, kKernel, kStride>(pixels, channel, p.squares[r] + p.square + lane, sums);
    if constexpr (kDot)
      row_dots<T, A, kKernel, kStride>(pixels, channel, weights + r * kKernel * lanes, dots);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA
