// What the depthwise kernels take: filters of one channel each, o = multiplier * c of them.
//
// A lane is one element of 64 bytes of compute values. In channels-last layout lanes are filters: a
// block is the filters of 64 bytes, and a task takes a group of blocks through a ring of rows of x.
// In contiguous layout lanes are pixels of a row: a block is the filters of one channel, and a task
// takes it through a band of rows. Ring and band hold x padded, in compute dtype, so that one loop
// over taps serves every stride, dilation, padding mode, dtype and layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/filter_scales.h"
#include "operator.h"
#include "shape.h"

namespace dcconv::cpu {

constexpr int64_t kLaneBytes = 64;

// Filters per channel that the kernels take: a block holds whole channels, also in float64.
constexpr int64_t kMaxMultiplier = 8;

// Where a ring or band holds what, in elements. Where lanes are pixels, rows and columns are
// numbered within their phase of the stride: output neighbours are neighbours in memory.
struct BandLayout {
  int64_t width;      // of a row of one block, all column phases
  int64_t phase;      // of one column phase
  int64_t row_phase;  // from one row phase to the next
  int64_t rows;       // in a ring
  int64_t elements;   // of all, with what vector loads may touch behind
  int64_t step;       // from one output to the next, or from 64 bytes of outputs to the next
};

struct DepthwiseShape {
  int64_t n, c, o;
  Axis rows, columns;
  bool channels_last;
  int64_t lanes;  // per 64 bytes
  int64_t band;   // output rows of a task
  int64_t group;  // blocks of a task
  BandLayout layout;

  int64_t multiplier() const { return o / c; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  int64_t pixels() const { return rows.output * columns.output; }
  int64_t bands() const { return (rows.output + band - 1) / band; }
  int64_t block_filters() const {
    return channels_last ? lanes / multiplier() * multiplier() : multiplier();
  }
  int64_t block_channels() const { return block_filters() / multiplier(); }
  int64_t blocks() const { return (o + block_filters() - 1) / block_filters(); }
  int64_t groups() const { return (blocks() + group - 1) / group; }
  int64_t tasks() const { return n * bands() * groups(); }
};

// In compute dtype: [blocks, lanes] where lanes are filters, else [o].
struct DepthwiseFilters {
  const void *a, *inverse_a, *rho, *inverse_rho, *k;
  const void* bias;    // or null
  const void* weight;  // [blocks, taps, lanes] or [o, taps]
};

struct DepthwiseParams {
  DepthwiseShape shape;
  Operator op;
  DepthwiseFilters filters;
  const FilterScales* scales;  // null unless the operator is tanh x cosine in float
  double eps;
  const int64_t* row_sources;     // [padded rows]
  const int64_t* column_sources;  // [padded columns]
  const int64_t* row_offsets;     // [kernel rows] in a band
  const int64_t* column_offsets;  // [kernel columns]
  const void* x;                  // storage dtype
  void* map;                      // b, or null
  void* y;                        // storage dtype; null: norms alone
  void* dot;                      // u in storage dtype, or null
  double* norm_sums;              // [tasks] sums of b, or null
};

// Backward, lanes are filters. The taps that reach an input pixel are those of its row and column
// phase, (pixel + padding) % stride: weights come phase by phase, and so do the rows and columns of
// the kernel.
struct DepthwiseGradParams {
  DepthwiseParams forward;        // shape, operator, filters with the weights by phase, x
  int64_t images;                 // of a task
  int64_t left;                   // columns of zeros before a row of du
  int64_t width;                  // elements of a row of du, one block
  int64_t depth;                  // rows of du in a ring
  const int64_t* row_starts;      // [row phases + 1] in kernel_rows
  const int64_t* kernel_rows;     // [kernel rows]
  const int64_t* column_starts;   // [column phases + 1] in kernel_columns
  const int64_t* kernel_columns;  // [kernel columns]
  Kept kept_is;
  const void* grad_y;  // storage dtype
  const void* kept;    // storage dtype
  const void* norm;    // b, [n, pixels, c]
  double add;          // what the mean norm adds to t b
  bool sums_only;
  bool parameters;    // whether sums are wanted
  void* grad_x;       // storage dtype, or null
  void* grad_weight;  // [tasks, group, taps, lanes] sums of du x, or null
  double* sums;       // [tasks, group, 4, lanes]: dy g h_rho, dy g h_a, dy h g_k, dy

  int64_t image_groups() const { return (forward.shape.n + images - 1) / images; }
  int64_t tasks() const { return image_groups() * forward.shape.groups(); }
};

// Kinds of sums, in this order.
constexpr int64_t kSumKinds = 4;

}  // namespace dcconv::cpu
