// x -> sum of squares over the channels of a group, per pixel, in compute dtype.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "storage.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Sixteen running sums, added pairwise at the end: rows of 16 or 24 channels are too short for the
// loop that a compiler makes of a plain reduction (5 times slower at 16 channels of bfloat16).
template <class A, class T>
DC_HD A sum_of_squares(const T* v, int64_t count) {
  constexpr int64_t kWidth = 16;
  A lanes[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
#pragma omp simd
    for (int64_t j = 0; j < kWidth; ++j) {
      const A x = load(v[i + j]);
      lanes[j] += x * x;
    }
  }
  A rest = 0;
  for (; i < count; ++i)
    rest += A(load(v[i])) * A(load(v[i]));
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j)
      lanes[j] += lanes[j + half];
  return lanes[0] + rest;
}

// Pixels of a few channels: a length that the compiler knows lets it take several pixels at once.
template <int64_t kChannels, class T, class A>
void small_sumsq(const T* x, A* sums, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A sum = 0;
    for (int64_t c = 0; c < kChannels; ++c)
      sum += A(load(x[i * kChannels + c])) * A(load(x[i * kChannels + c]));
    sums[i] = sum;
  }
}

template <class T, class A>
void pixel_sumsq(const PixelSumsqParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  A* sums = static_cast<A*>(p.sums);
  const int64_t channels = p.c / p.groups;
  if (p.channels_last) {
    const int64_t step = p.task_pixels();
    const int64_t first = begin * step, last = std::min(end * step, p.n * p.pixels);
    const int64_t from = first * p.groups, to = last * p.groups;
    if (channels == 3) {
      small_sumsq<3>(x + from * 3, sums + from, to - from);
    } else {
      for (int64_t i = from; i < to; ++i)
        sums[i] = sum_of_squares<A>(x + i * channels, channels);
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / p.blocks(), first = task % p.blocks() * kTile;
    const int64_t count = std::min(kTile, p.pixels - first);
    A* out = sums + plane * p.pixels + first;
    std::fill_n(out, count, A(0));
    for (int64_t c = 0; c < channels; ++c) {
      const T* v = x + (plane * channels + c) * p.pixels + first;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        out[i] += load(v[i]) * load(v[i]);
    }
  }
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
