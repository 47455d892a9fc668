// x -> sum of squares over the channels of a group, per pixel, in compute dtype.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/pixels.h"
#include "cpu/kernels/vector.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Sixteen running sums, added pairwise at the end: rows of 16 or 24 channels are too short for the
// loop that a compiler makes of a plain reduction (5 times slower at 16 channels of bfloat16).
template <class A, class T>
DC_HD A sum_of_squares(const T* v, int64_t count) {
  constexpr int64_t kWidth = 16, kLongest = 32;
  if (count > kLongest * kWidth)
    return lane_sum<A>(count, [=](int64_t i) { return A(load(v[i])) * A(load(v[i])); });
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

// As many pixels at a time as a vector has lanes, whose running sums are added up together: a sum
// over the lanes of one vector takes longer than the squares of 16 channels. Returns the pixels
// done.
template <class T>
int64_t grouped_sumsq(const T* x, float* sums, int64_t count, int64_t channels) {
  if (channels % kLanes != 0 || channels > 8 * kLanes)
    return 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector lanes[kLanes];
    for (int64_t pixel = 0; pixel < kLanes; ++pixel) {
      const T* v = x + (i + pixel) * channels;
      Vector sum{};
      // Whole vectors, not by way of an array: a load that two narrower stores fill waits for both
      // to reach the cache (3.6 times slower at 64 channels of float with AVX2).
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vector values;
        load_pixels<float>(values, v + c);
        sum += values * values;
      }
      lanes[pixel] = sum;
    }
    store_vector(sums + i, lane_sums(lanes));
  }
  return i;
}

template <class T, class A>
void pixel_sumsq(const PixelSumsqParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  A* sums = static_cast<A*>(p.sums);
  const int64_t channels = p.c / p.groups;
  if (p.channels_last) {
    // Task by task: which pixels are added up together must not depend on the number of threads.
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task * p.task_pixels() * p.groups;
      const int64_t to = std::min((task + 1) * p.task_pixels(), p.n * p.pixels) * p.groups;
      int64_t i = from;
      if (channels == 3) {
        small_sumsq<3>(x + from * 3, sums + from, to - from);
        continue;
      }
      if constexpr (std::is_same_v<A, float>)
        i += grouped_sumsq(x + from * channels, sums + from, to - from, channels);
      for (; i < to; ++i)
        sums[i] = sum_of_squares<A>(x + i * channels, channels);
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / p.blocks(), first = task % p.blocks() * kTile;
    const int64_t count = std::min(kTile, p.pixels - first);
    A* out = sums + plane * p.pixels + first;
    A part[kTile];
    for (int64_t from = 0; from < channels; from += kAddends) {
      A* to = from == 0 ? out : part;
      std::fill_n(to, count, A(0));
      for (int64_t c = from; c < std::min(from + kAddends, channels); ++c) {
        const T* v = x + (plane * channels + c) * p.pixels + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          to[i] += load(v[i]) * load(v[i]);
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
