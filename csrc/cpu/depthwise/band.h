// Rows of x as the kernels read them: padded, in compute dtype, 64 bytes of lanes per pixel or
// phase by phase.
#pragma once

#include <algorithm>

#include "cpu/depthwise/direct.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Uninitialised memory at a cache line's start.
template <class A>
class Buffer {
public:
  explicit Buffer(int64_t count)
      : memory_(new char[static_cast<std::size_t>(count) * sizeof(A) + kLaneBytes]) {}
  ~Buffer() { delete[] memory_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  A* data() const {
    const uintptr_t line = kLaneBytes;
    return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_) + line - 1) / line * line);
  }

private:
  char* memory_;
};

// Where a task is: blocks and output rows.
struct Place {
  int64_t image, first_row, end_row, first_block, end_block;

  Place(const DepthwiseShape& s, int64_t task) {
    const int64_t band = task / s.groups() % s.bands(), group = task % s.groups();
    image = task / s.groups() / s.bands();
    first_row = band * s.band;
    end_row = std::min(first_row + s.band, s.rows.output);
    first_block = group * s.group;
    end_block = std::min(first_block + s.group, s.blocks());
  }
};

// Channels of a pixel as lanes of compute dtype; each fills `repeat` lanes.
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

// The first `used` lanes to memory.
template <class A, class T>
DC_HD void store_lanes(const T* from, int64_t used, T* to) {
  constexpr int64_t lanes = Lanes<A>::count;
  if (used == lanes) {
    std::memcpy(to, from, static_cast<std::size_t>(lanes) * sizeof(T));
    return;
  }
  for (int64_t lane = 0; lane < used; ++lane)
    to[lane] = from[lane];
}

// A padded row that shows one of x, the blocks of a task: [blocks, columns, lanes].
template <class T, class A>
void load_row(const DepthwiseParams& p, const Place& at, int64_t padded_row, A* to) {
  const DepthwiseShape& s = p.shape;
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t h = p.row_sources[padded_row], blocks = at.end_block - at.first_block;
  const int64_t first = at.first_block * s.block_channels();
  const T* row =
      static_cast<const T*>(p.x) + (at.image * s.rows.input + h) * s.columns.input * s.c + first;
  const bool full = s.multiplier() == 1 && at.end_block * lanes <= s.c;
  for (int64_t j = 0; j < s.columns.padded(); ++j) {
    const int64_t w = p.column_sources[j];
    if (full && w >= 0) {
      const T* pixel = row + w * s.c;
      for (int64_t block = 0; block < blocks; ++block) {
        A* out = to + block * s.layout.width + j * lanes;
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i)
          out[i] = load(pixel[block * lanes + i]);
      }
      continue;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      A* pixel = to + block * s.layout.width + j * lanes;
      const int64_t channel = block * s.block_channels();
      if (w < 0) {
        std::fill_n(pixel, lanes, A(0));
      } else {
        load_lanes(
            row + w * s.c + channel,
            std::min(s.block_channels(), s.c - first - channel),
            s.multiplier(),
            pixel
        );
      }
    }
  }
}

// A band of one channel, phase by phase.
template <class T, class A>
void load_band(const DepthwiseParams& p, const Place& at, A* band) {
  const DepthwiseShape& s = p.shape;
  const T* plane = static_cast<const T*>(p.x) +
                   (at.image * s.c + at.first_block) * s.rows.input * s.columns.input;
  const int64_t rows =
      (at.end_row - at.first_row - 1) * s.rows.stride + (s.rows.kernel - 1) * s.rows.dilation + 1;
  const int64_t before = s.columns.before, input = s.columns.input;
  for (int64_t i = 0; i < rows; ++i) {
    A* to = band + i % s.rows.stride * s.layout.row_phase + i / s.rows.stride * s.layout.width;
    const int64_t h = p.row_sources[at.first_row * s.rows.stride + i];
    const T* row = plane + std::max<int64_t>(h, 0) * input;
    const auto value = [&](int64_t j) {
      const int64_t w = p.column_sources[j];
      return h < 0 || w < 0 ? A(0) : A(load(row[w]));
    };
    if (s.columns.stride == 1) {
      for (int64_t j = 0; j < before; ++j)
        to[j] = value(j);
      A* inside = to + before;
      if (h < 0) {
        std::fill_n(inside, input, A(0));
      } else {
#pragma omp simd
        for (int64_t w = 0; w < input; ++w)
          inside[w] = load(row[w]);
      }
      for (int64_t j = before + input; j < s.columns.padded(); ++j)
        to[j] = value(j);
      continue;
    }
    for (int64_t phase = 0; phase < s.columns.stride; ++phase)
      for (int64_t j = phase; j < s.columns.padded(); j += s.columns.stride)
        to[phase * s.layout.phase + j / s.columns.stride] = value(j);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA
