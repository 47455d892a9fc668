// x -> y = max(0, x scale[c] + shift[c]) and the sums of its squares, in one pass over x.
#pragma once

#include <algorithm>

#include "cpu/kernels/pixel_sumsq.h"

namespace dcconv::cpu::DCCONV_ISA {

template <class T, class A>
DC_HD T affine_relu_of(T x, A scale, A shift) {
  return Store<T>::from(at_least(load(x) * scale + shift, A(0)));
}

// Channels last: whole rows of c channels at a time, as many as kTile elements hold, so that rows
// of a few channels are as long a loop as those of many.
template <class A>
class ChannelRows {
public:
  ChannelRows(const A* scale, const A* shift, int64_t c)
      : c_(c), rows_(std::max<int64_t>(kTile / c, 1)), scale_(scale), shift_(shift) {
    if (rows_ == 1)
      return;
    for (int64_t row = 0; row < rows_; ++row) {
      std::copy_n(scale, c, scales_ + row * c);
      std::copy_n(shift, c, shifts_ + row * c);
    }
    scale_ = scales_;
    shift_ = shifts_;
  }
  ChannelRows(const ChannelRows&) = delete;

  template <class T>
  void apply(const T* x, T* y, int64_t rows) const {
    for (int64_t row = 0; row < rows; row += rows_) {
      const int64_t first = row * c_, count = std::min(rows_, rows - row) * c_;
      const T* from = x + first;
      T* to = y + first;
      const A *scale = scale_, *shift = shift_;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        to[i] = affine_relu_of(from[i], scale[i], shift[i]);
    }
  }

private:
  int64_t c_, rows_;
  const A *scale_, *shift_;
  A scales_[kTile], shifts_[kTile];
};

template <class T, class A>
void affine_relu(const AffineReluParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  const A *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  T* y = static_cast<T*>(p.y);
  const PixelSumsqParams squares = p.squares();
  if (p.channels_last) {
    const ChannelRows<A> rows(scale, shift, p.c);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * squares.task_pixels();
      const int64_t count = std::min(squares.task_pixels(), p.n * p.pixels - first);
      rows.apply(x + first * p.c, y + first * p.c, count);
      pixel_sumsq<T, A>(squares, task, task + 1);  // from the cache
    }
    return;
  }
  // As pixel_sumsq adds up, addend for addend.
  const int64_t channels = p.c / p.groups;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / squares.blocks(), first = task % squares.blocks() * kTile;
    const int64_t count = std::min(kTile, p.pixels - first), group = plane % p.groups * channels;
    A* out = static_cast<A*>(p.sums) + plane * p.pixels + first;
    A part[kTile];
    for (int64_t from = 0; from < channels; from += kAddends) {
      A* sums = from == 0 ? out : part;
      std::fill_n(sums, count, A(0));
      for (int64_t c = from; c < std::min(from + kAddends, channels); ++c) {
        const int64_t offset = (plane * channels + c) * p.pixels + first;
        const T* v = x + offset;
        T* to = y + offset;
        const A factor = scale[group + c], addend = shift[group + c];
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const T value = affine_relu_of(v[i], factor, addend);
          to[i] = value;
          sums[i] += load(value) * load(value);
        }
      }
      if (from > 0) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          out[i] += part[i];
      }
    }
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA
