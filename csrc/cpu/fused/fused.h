// The operator fused, in one pass over its tensors, for float32 without groups: products by the
// kernels of gemm.h, block by block of positions, each block with its norms and its elementwise
// part while it is in the second-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/directions.h"

namespace dcconv::cpu {

// A window of one pixel that visits all of them: positions are rows of one matrix.
inline bool is_pointwise(const ConvShape& shape) {
  const auto plain = [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.before == 0 && axis.after == 0;
  };
  return plain(shape.rows) && plain(shape.columns);
}

// A window of one pixel without padding: x at some of its pixels, which a copy makes rows of one
// matrix.
inline bool is_sampled(const ConvShape& shape) {
  const auto bare = [](const Axis& axis) {
    return axis.kernel == 1 && axis.before == 0 && axis.after == 0;
  };
  return shape.channels_last && bare(shape.rows) && bare(shape.columns);
}

// Whether the kernels of gemm.h compute the call at all.
inline bool fused_fits(const Call& call, bool backward) {
  const ConvShape& shape = call.shape;
  if (call.dtype != Dtype::f32 || call.norm_free || shape.groups != 1 || shape.n == 0)
    return false;
  if (!shape.channels_last)
    return is_pointwise(shape);
  const bool zeros = shape.rows.mode == PaddingMode::zeros;
  return !backward || (zeros && shape.rows.stride == 1 && shape.columns.stride == 1);
}

// Positions of a 1x1 block: its rows of x and u take half of a second-level cache of 512 KB, and
// there are 32 blocks or more where the problem has the positions for it.
inline int64_t pointwise_block(const ConvShape& shape) {
  const int64_t fitting = (int64_t{256} << 10) / (4 * (shape.c + shape.o));
  const int64_t shared = (shape.positions() + 31) / 32;
  const int64_t rows = std::max<int64_t>(std::min(fitting, shared), 16);
  const Positions one{1, 1, shape.o, 1, true, false};
  return (rows + one.tile_rows() - 1) / one.tile_rows() * one.tile_rows();
}

// Groups of blocks in backward, each with a sum of its own for the filters: 32 MB of sums.
inline int64_t most_groups(const ConvShape& shape) {
  const int64_t fitting = (int64_t{32} << 20) / (4 * shape.o * shape.filter_size());
  return std::max<int64_t>(1, std::min<int64_t>(fitting, 32));
}

// Whether one pass takes less time than the passes around the library's convolution. Measured as
// times of F.conv2d on one core with AVX-512, forward and forward with backward, one pass against
// library, tanh x cosine:
//
//     [8, 256, 56, 56] -> 64, 1x1     0.79 : 1.17   0.90 : 1.24
//     [8, 64, 56, 56] -> 256, 1x1     0.98 : 1.25   1.18 : 1.57
//     [8, 512, 7, 7] -> 2048, 1x1     0.87 : 1.08   1.33 : 1.15   few positions, large filters
//     [8, 256, 56, 56] -> 512, 1x1/2  1.05 : 1.15
//     [8, 1024, 14, 14] -> 2048, /2   0.88 : 1.18
//     [64, 16, 32, 32] -> 16, 3x3     1.20 : 1.44   1.53 : 1.56
//     [8, 32, 56, 56] -> 32, 3x3      1.08 : 1.24   1.16 : 1.24
//     [64, 96, 32, 32] -> 96, 3x3     1.06 : 1.04
//     [8, 3, 224, 224] -> 96, 4x4/4   1.25 : 1.60
//     [2, 512, 7, 7] -> 2048, 1x1     1.13 : 1.21
//     [1, 512, 7, 7] -> 2048, 1x1     1.67 : 1.33         the filters are packed for few positions
//     [128, 256, 1, 1] -> 64, 1x1     7.1 : 2.9           contiguous: vectors of one pixel
//
// Windows of long filters are the library's: its products are as fast and it reads patches better.
inline bool fused_pays(const ConvShape& shape, int64_t panel, bool backward) {
  if (panel < 16)  // the library uses vectors of 256 bits or more where these kernels do not
    return false;
  const bool pointwise = is_pointwise(shape);
  const bool shallow = shape.filter_size() <= 300;
  if (!backward) {
    if (!shape.channels_last)
      return shape.output_pixels() >= 16;
    const bool packs_little = shape.o * shape.filter_size() <= (int64_t{1} << 15);
    return (is_sampled(shape) || shallow) && (packs_little || shape.positions() >= 96);
  }
  if (pointwise) {
    // In contiguous layout a block ends with its image: 1.5 : 1.2 for [8, 256, 14, 14] -> 1024,
    // 1.0 : 1.4 for [8, 256, 56, 56] -> 64.
    const bool whole = shape.channels_last || shape.output_pixels() >= kTile;
    return whole && shape.positions() >= 1024 && most_groups(shape) >= 8;
  }
  // One image is one task.
  const int64_t image = 4 * shape.output_pixels() * (shape.o + shape.c);
  return shallow && shape.n >= 8 && image <= (int64_t{1} << 20);
}

inline bool takes_fused(const Call& call, bool backward) {
  const Strategy forced = forced_strategy();
  return forced != Strategy::library && fused_fits(call, backward) &&
         (forced == Strategy::fused || fused_pays(call.shape, call.table.panel, backward));
}

ForwardResults fused_forward(const Call& call, const ForwardInputs& in);
BackwardResults fused_backward(const Call& call, const BackwardInputs& in);

}  // namespace dcconv::cpu
