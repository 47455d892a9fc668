// Copies bands of x: padded, in compute dtype, 64 bytes of lanes per pixel or phase by phase.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/depthwise/direct.h"
#include "storage.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Uninitialised memory at a cache line's start.
template <class A>
class Buffer {
public:
  explicit Buffer(int64_t count) : memory_(new char[static_cast<std::size_t>(count) * sizeof(A) + 64]) {}
  ~Buffer() { delete[] memory_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  A* data() const {
    return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }

private:
  char* memory_;
};

// Where a task is.
struct Place {
  int64_t image, band, block;
  int64_t first_row, end_row;      // output rows
  int64_t first_filter, filters;   // of the block
  int64_t first_channel, channels;

  Place(const DepthwiseShape& s, int64_t image, int64_t band, int64_t block)
      : image(image), band(band), block(block), first_row(band * s.band),
        end_row(std::min(first_row + s.band, s.rows.output)),
        first_filter(block * s.block_filters()),
        filters(std::min(s.block_filters(), s.o - first_filter)),
        first_channel(first_filter / s.multiplier()), channels(filters / s.multiplier()) {}
};

// `lanes` values of storage dtype as lanes of compute dtype; each channel fills `repeat` lanes.
template <class T, class A>
DC_HD void load_lanes(const T* from, int64_t channels, int64_t repeat, A* to) {
  constexpr int64_t lanes = Lanes<A>::count;
  if (channels == lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i)
      to[i] = load(from[i]);
    return;
  }
  int64_t lane = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < repeat; ++j)
      to[lane++] = load(from[c]);
  for (; lane < lanes; ++lane)
    to[lane] = A(0);
}

template <class T, class A>
void load_band_channels(const DepthwiseParams& p, const Place& at, A* band) {
  const DepthwiseShape& s = p.shape;
  constexpr int64_t lanes = Lanes<A>::count;
  const T* image = static_cast<const T*>(p.x) +
                   at.image * s.rows.input * s.columns.input * s.c + at.first_channel;
  const int64_t rows = (at.end_row - at.first_row - 1) * s.rows.stride +
                       (s.rows.kernel - 1) * s.rows.dilation + 1;
  for (int64_t i = 0; i < rows; ++i) {
    A* to = band + i * s.layout.width;
    const int64_t h = p.row_sources[at.first_row * s.rows.stride + i];
    if (h < 0) {
      std::fill_n(to, s.layout.width, A(0));
      continue;
    }
    const T* row = image + h * s.columns.input * s.c;
    const auto padding = [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        const int64_t w = p.column_sources[j];
        if (w < 0) {
          std::fill_n(to + j * lanes, lanes, A(0));
        } else {
          load_lanes(row + w * s.c, at.channels, s.multiplier(), to + j * lanes);
        }
      }
    };
    padding(0, s.columns.before);
    A* inside = to + s.columns.before * lanes;
    for (int64_t w = 0; w < s.columns.input; ++w)
      load_lanes(row + w * s.c, at.channels, s.multiplier(), inside + w * lanes);
    padding(s.columns.before + s.columns.input, s.columns.padded());
  }
}

template <class T, class A>
void load_band_pixels(const DepthwiseParams& p, const Place& at, A* band) {
  const DepthwiseShape& s = p.shape;
  const T* plane = static_cast<const T*>(p.x) +
                   (at.image * s.c + at.first_channel) * s.rows.input * s.columns.input;
  const int64_t rows = (at.end_row - at.first_row - 1) * s.rows.stride +
                       (s.rows.kernel - 1) * s.rows.dilation + 1;
  const int64_t before = s.columns.before, input = s.columns.input;
  for (int64_t i = 0; i < rows; ++i) {
    A* to = band + i % s.rows.stride * s.layout.row_phase + i / s.rows.stride * s.layout.width;
    const int64_t h = p.row_sources[at.first_row * s.rows.stride + i];
    const T* row = plane + std::max<int64_t>(h, 0) * input;
    if (s.columns.stride == 1) {
      const auto padding = [&](int64_t first, int64_t last) {
        for (int64_t j = first; j < last; ++j) {
          const int64_t w = p.column_sources[j];
          to[j] = h < 0 || w < 0 ? A(0) : A(load(row[w]));
        }
      };
      padding(0, before);
      A* inside = to + before;
      if (h < 0) {
        std::fill_n(inside, input, A(0));
      } else {
#pragma omp simd
        for (int64_t w = 0; w < input; ++w)
          inside[w] = load(row[w]);
      }
      padding(before + input, s.columns.padded());
      continue;
    }
    for (int64_t phase = 0; phase < s.columns.stride; ++phase)
      for (int64_t j = phase; j < s.columns.padded(); j += s.columns.stride) {
        const int64_t w = p.column_sources[j];
        to[phase * s.layout.phase + j / s.columns.stride] =
            h < 0 || w < 0 ? A(0) : A(load(row[w]));
      }
  }
}

template <class T, class A>
void load_band(const DepthwiseParams& p, const Place& at, A* band) {
  if (p.shape.channels_last) {
    load_band_channels<T>(p, at, band);
  } else {
    load_band_pixels<T>(p, at, band);
  }
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv
