// What the depthwise kernels take: filters of one channel each, o = multiplier * c of them.
//
// A lane is one element of 64 bytes of compute values. In channels-last layout the lanes of a block
// are filters, in contiguous layout they are pixels of a row. Everything is computed from a band: a
// copy of some rows of x for one block, padded, in compute dtype and dense, so that one loop over
// taps serves every stride, dilation, padding mode, dtype and layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "operator.h"
#include "shape.h"

namespace dcconv {
namespace cpu {

constexpr int64_t kLaneBytes = 64;

// Filters per channel that channels-last blocks hold: a block has whole groups, also in float64.
constexpr int64_t kMaxMultiplier = 8;

// Where a band holds what, in elements. Where lanes are pixels, rows and columns are numbered within
// their phase of the stride: then output neighbours are neighbours in memory at any stride.
struct BandLayout {
  int64_t width;      // of a row, all column phases
  int64_t phase;      // of one column phase
  int64_t row_phase;  // from one row phase to the next
  int64_t elements;   // of the band, with what vector loads may touch behind it
  int64_t line;       // from one output row to the next
  int64_t step;       // from one block of outputs to the next
};

struct DepthwiseShape {
  int64_t n, c, o;
  Axis rows, columns;
  bool channels_last;
  int64_t lanes;      // per 64 bytes
  int64_t band;       // output rows of a task
  int64_t images;     // images of a backward task
  BandLayout layout;

  int64_t multiplier() const { return o / c; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  int64_t pixels() const { return rows.output * columns.output; }
  int64_t bands() const { return (rows.output + band - 1) / band; }
  // Filters that share a band: those of a block, or those of a channel.
  int64_t block_filters() const {
    return channels_last ? lanes / multiplier() * multiplier() : multiplier();
  }
  int64_t blocks() const { return (o + block_filters() - 1) / block_filters(); }
  int64_t tasks() const { return n * bands() * blocks(); }
  int64_t image_groups() const { return (n + images - 1) / images; }
  int64_t grad_tasks() const { return image_groups() * bands() * blocks(); }
};

// Per filter, [o] each, compute dtype.
struct DepthwiseFilters {
  const void *a, *inverse_a, *rho, *inverse_rho, *k;
  const void* bias;  // or null
  const void* weight;  // [o, taps]
};

struct DepthwiseParams {
  DepthwiseShape shape;
  Operator op;
  DepthwiseFilters filters;
  double eps;
  const int64_t* row_sources;     // [padded rows]
  const int64_t* column_sources;  // [padded columns]
  const int64_t* offsets;         // [taps] in a band
  const int64_t* row_offsets;     // [kernel rows]
  const int64_t* column_offsets;  // [kernel columns]
  const void* x;                  // storage dtype
  void* map;                      // b, or null
  void* y;                        // storage dtype; null: norms alone
  void* dot;                      // u in storage dtype, or null
  double* norm_sums;              // [tasks] sums of b, or null
};

}  // namespace cpu
}  // namespace dcconv
