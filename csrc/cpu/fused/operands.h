// Filters and images as the products of the fused kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/operands.h"

namespace dcconv::cpu {

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

}  // namespace dcconv::cpu
