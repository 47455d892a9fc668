// Geometry of one call. Letters: n batch, c/h/w input, o filters, p/q output, r/s filter rows and
// columns, g groups. Sizes in elements, pads in pixels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcconv {

enum class PaddingMode { zeros, reflect, replicate, circular };

// One axis of a convolution window.
struct Axis {
  int64_t input;   // h or w
  int64_t output;  // p or q
  int64_t kernel;  // r or s
  int64_t stride;
  int64_t dilation;
  int64_t before;  // padding at the start
  int64_t after;   // padding at the end
  PaddingMode mode;

  int64_t padded() const { return input + before + after; }

  // The input index that a padded index shows, or -1 where it shows a zero.
  int64_t source(int64_t padded_index) const {
    const int64_t i = padded_index - before;
    if (i >= 0 && i < input)
      return i;
    switch (mode) {
    case PaddingMode::zeros:
      return -1;
    case PaddingMode::reflect:
      return i < 0 ? -i : 2 * (input - 1) - i;
    case PaddingMode::replicate:
      return i < 0 ? 0 : input - 1;
    case PaddingMode::circular:
      return i < 0 ? i + input : i - input;
    }
    return -1;
  }

  std::vector<int64_t> sources() const {
    std::vector<int64_t> map(static_cast<std::size_t>(padded()));
    for (int64_t i = 0; i < padded(); ++i)
      map[static_cast<std::size_t>(i)] = source(i);
    return map;
  }
};

struct ConvShape {
  int64_t n, c, o, groups;
  Axis rows;     // h, p, r
  Axis columns;  // w, q, s
  bool channels_last;

  int64_t input_pixels() const { return rows.input * columns.input; }
  int64_t output_pixels() const { return rows.output * columns.output; }
  int64_t positions() const { return n * output_pixels(); }
  int64_t filter_size() const { return c / groups * rows.kernel * columns.kernel; }
};

}  // namespace dcconv
