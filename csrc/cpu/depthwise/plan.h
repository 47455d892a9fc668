// Geometry of a call as the depthwise kernels read it: sizes of bands and rings, offsets in them,
// parameters by lane.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels/depthwise_params.h"

namespace dcconv::cpu {

// Bytes of a band or ring: with the output beside it, it stays in a second-level cache.
constexpr int64_t kBandBytes = 128 << 10;
constexpr int64_t kRingBytes = 256 << 10;

// Tasks that a call is cut into at least, where it has so many rows.
constexpr int64_t kLeastTasks = 8;

// Of all rings of backward.
constexpr int64_t kGradRingBytes = 512 << 10;

// Images share partial sums beyond this many groups of images.
constexpr int64_t kMostImageGroups = 64;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct DepthwisePlan {
  DepthwiseShape shape;
  std::vector<int64_t> row_sources, column_sources, row_offsets, column_offsets;
};

inline DepthwisePlan make_plan(const ConvShape& conv, int64_t element) {
  DepthwisePlan plan{};
  DepthwiseShape& s = plan.shape;
  s.n = conv.n;
  s.c = conv.c;
  s.o = conv.o;
  s.rows = conv.rows;
  s.columns = conv.columns;
  s.channels_last = conv.channels_last;
  s.lanes = kLaneBytes / element;
  BandLayout& l = s.layout;
  const int64_t halo = (s.rows.kernel - 1) * s.rows.dilation + 1;
  int64_t most = s.rows.output;  // rows of a band
  if (s.channels_last) {
    // An odd number of lines: equal columns of neighbouring blocks are in different cache sets.
    l.width = (s.columns.padded() | 1) * s.lanes;
    l.step = s.columns.stride * s.lanes;
    l.rows = halo;
    const int64_t fitting = std::max<int64_t>(kRingBytes / (halo * l.width * element), 4);
    s.group = ceil_div(s.blocks(), ceil_div(s.blocks(), fitting));
  } else {
    l.phase = ceil_div(s.columns.padded(), s.columns.stride);
    l.width = l.phase * s.columns.stride;
    l.step = s.lanes;
    s.group = 1;
    const int64_t fitting = kBandBytes / (l.width * element);
    most = std::max<int64_t>((fitting - halo) / s.rows.stride + 1, 1);
  }
  const int64_t bands = std::max(
      ceil_div(s.rows.output, most), ceil_div(kLeastTasks, std::max<int64_t>(s.n, 1) * s.groups())
  );
  s.band = ceil_div(s.rows.output, std::min(bands, s.rows.output));
  if (s.channels_last) {
    l.elements = l.rows * s.group * l.width;
  } else {
    const int64_t phase_rows = ceil_div((s.band - 1) * s.rows.stride + halo, s.rows.stride);
    l.row_phase = phase_rows * l.width;
    l.elements = s.rows.stride * l.row_phase + 4 * s.lanes;
  }

  plan.row_sources = s.rows.sources();
  plan.column_sources = s.columns.sources();
  if (!s.channels_last)
    for (int64_t r = 0; r < s.rows.kernel; ++r) {
      const int64_t i = r * s.rows.dilation;
      plan.row_offsets.push_back(i % s.rows.stride * l.row_phase + i / s.rows.stride * l.width);
    }
  for (int64_t c = 0; c < s.columns.kernel; ++c) {
    const int64_t j = c * s.columns.dilation;
    plan.column_offsets.push_back(
        s.channels_last ? j * s.lanes : j % s.columns.stride * l.phase + j / s.columns.stride
    );
  }
  return plan;
}

// Per-filter values [o, size] by block: [blocks, size, lanes]. Lanes without a filter repeat the
// last one's values.
template <class A>
std::vector<A> by_block(const DepthwiseShape& s, const A* values, int64_t size) {
  std::vector<A> to(static_cast<std::size_t>(s.blocks() * size * s.lanes));
  A* block_values = to.data();
  for (int64_t block = 0; block < s.blocks(); ++block, block_values += size * s.lanes) {
    const int64_t first = block * s.block_filters();
    const int64_t last = std::min(first + s.block_filters(), s.o) - 1;
    for (int64_t lane = 0; lane < s.lanes; ++lane) {
      const A* from = values + std::min(first + lane, last) * size;
      for (int64_t i = 0; i < size; ++i)
        block_values[i * s.lanes + lane] = from[i];
    }
  }
  return to;
}

}  // namespace dcconv::cpu
