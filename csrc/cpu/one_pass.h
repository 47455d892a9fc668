// The operator in one pass over its tensors, for float32 without groups: products by
// the kernels of gemm.h, block by block of positions, each block with its norms and its elementwise
// part while it is in the second-level cache.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/directions.h"
#include "cpu/operands.h"

namespace dcconv {
namespace cpu {

// Floats on a cache line of their own, not initialised.
class Scratch {
public:
  explicit Scratch(int64_t count)
      : floats_(
            static_cast<float*>(
                std::aligned_alloc(64, static_cast<std::size_t>((count * 4 + 64 + 63) / 64 * 64))
            )
        ) {
    if (floats_ == nullptr)
      throw std::bad_alloc();
  }
  float* get() const { return floats_.get(); }

private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> floats_;
};

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
inline bool one_pass_fits(const Call& call, bool backward) {
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
inline bool one_pass_pays(const ConvShape& shape, int64_t panel, bool backward) {
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

inline bool takes_one_pass(const Call& call, bool backward) {
  const Scheme forced = forced_scheme();
  return forced != Scheme::library && one_pass_fits(call, backward) &&
         (forced == Scheme::own || one_pass_pays(call.shape, call.table.panel, backward));
}

// Filters [o, r, s, c] as panels of a matrix [r s c, o], or, turned by 180 degrees, [r s o, c].
struct PackedFilters {
  PackedFilters(const Call& call, const Tensor& weight, bool turned)
      : depth((turned ? call.shape.o : call.shape.c) * taps(call)),
        columns(turned ? call.shape.c : call.shape.o),
        panels((columns + call.table.panel - 1) / call.table.panel),
        values(panels * depth * call.table.panel) {
    const Tensor dense = contiguous(weight, true);
    const int64_t size = call.shape.filter_size(), c = call.shape.c;
    const float* from = static_cast<const float*>(dense.const_data_ptr());
    const int64_t parts = turned ? taps(call) : 1, part = depth / parts;
    run_tasks(
        panels,
        [&](int64_t begin, int64_t end) {
          for (int64_t tap = 0; tap < parts; ++tap) {
            const PanelParams p{
                part,
                columns,
                turned ? from + (parts - 1 - tap) * c : from,
                turned ? size : 1,
                turned ? 1 : size,
                values.get() + tap * part * call.table.panel,
                depth * call.table.panel
            };
            call.table.pack_panels(p, begin, end);
          }
        },
        kTask / (depth * call.table.panel) + 1
    );
  }

  static int64_t taps(const Call& call) {
    return call.shape.rows.kernel * call.shape.columns.kernel;
  }

  // As the right factor of a product; a's side is left to the caller.
  GemmParams product(const Kernels& table, int64_t segments) const {
    GemmParams p{};
    p.n = columns;
    p.k = depth / segments;
    p.segments = segments;
    p.b = values.get();
    p.b_k = table.panel;
    p.b_segment = p.k * table.panel;
    p.b_panel = depth * table.panel;
    return p;
  }

  int64_t depth, columns, panels;
  Scratch values;
};

// Where the parts of a patch begin in a padded image of `width` values per pixel: whole window rows
// where their pixels lie side by side, else single pixels.
inline std::vector<int64_t> patch_offsets(const ConvShape& shape, int64_t row, int64_t width) {
  std::vector<int64_t> offsets;
  const bool whole = shape.columns.dilation == 1 || shape.columns.kernel == 1;
  for (int64_t r = 0; r < shape.rows.kernel; ++r)
    for (int64_t s = 0; s < (whole ? 1 : shape.columns.kernel); ++s)
      offsets.push_back(r * shape.rows.dilation * row + s * shape.columns.dilation * width);
  return offsets;
}

// Images with their padding, some rows at a time.
class PaddedRows {
public:
  // copies: even where nothing is padded, so that rows may be read behind their end.
  explicit PaddedRows(const ConvShape& shape, bool copies = false)
      : shape_(shape), row_sources_(shape.rows.sources()), column_sources_(shape.columns.sources()),
        plain_(
            !copies && shape.rows.padded() == shape.rows.input &&
            shape.columns.padded() == shape.columns.input
        ) {}

  // Padded rows that output rows [first, first + count) see, and how many values they have.
  int64_t begin(int64_t first) const { return first * shape_.rows.stride; }
  int64_t rows(int64_t count) const {
    return (count - 1) * shape_.rows.stride + (shape_.rows.kernel - 1) * shape_.rows.dilation + 1;
  }
  int64_t row() const { return shape_.columns.padded() * shape_.c; }
  int64_t scratch(int64_t count) const { return plain_ ? 0 : rows(count) * row(); }

  // The rows of x themselves where nothing is padded, else a copy in `scratch`.
  const float* copy(const float* image, int64_t first, int64_t count, float* scratch) const {
    const int64_t c = shape_.c, input_row = shape_.columns.input * c;
    if (plain_)
      return image + begin(first) * input_row;
    for (int64_t i = 0; i < rows(count); ++i) {
      float* to = scratch + i * row();
      const int64_t h = row_sources_[static_cast<std::size_t>(begin(first) + i)];
      if (h < 0) {
        std::fill_n(to, row(), 0.0f);
        continue;
      }
      const float* from = image + h * input_row;
      edge(from, to, 0, shape_.columns.before);
      std::copy_n(from, input_row, to + shape_.columns.before * c);
      edge(from, to, shape_.columns.before + shape_.columns.input, shape_.columns.padded());
    }
    return scratch;
  }

  // Input rows [low, high) that output rows [first, first + count) show.
  std::pair<int64_t, int64_t> shown(int64_t first, int64_t count) const {
    int64_t low = shape_.rows.input, high = 0;
    for (int64_t i = begin(first); i < begin(first) + rows(count); ++i) {
      const int64_t h = row_sources_[static_cast<std::size_t>(i)];
      if (h < 0)
        continue;
      low = std::min(low, h);
      high = std::max(high, h + 1);
    }
    return {std::min(low, high), high};
  }

  WindowParams window(double eps) const {
    return {1, 1, shape_.rows, shape_.columns, row_sources_.data(), column_sources_.data(), eps};
  }

private:
  void edge(const float* from, float* to, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t source = column_sources_[static_cast<std::size_t>(i)];
      if (source < 0) {
        std::fill_n(to + i * shape_.c, shape_.c, 0.0f);
      } else {
        std::copy_n(from + source * shape_.c, shape_.c, to + i * shape_.c);
      }
    }
  }

  ConvShape shape_;
  std::vector<int64_t> row_sources_, column_sources_;
  bool plain_;
};

ForwardResults one_pass_forward(const Call& call, const ForwardInputs& in);
BackwardResults one_pass_backward(const Call& call, const BackwardInputs& in);

}  // namespace cpu
}  // namespace dcconv
