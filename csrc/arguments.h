// Reads an op's arguments into plain structs. Python has checked what the user typed; the checks
// here guard memory.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "functions.h"
#include "shape.h"

namespace dcconv {

using Ints = std::vector<int64_t>;

template <class... F>
int index_of(portable::TypeList<F...>, const std::string& name, const char* what) {
  int index = 0, found = -1;
  ((name == F::name ? found = index : 0, ++index), ...);
  if (found < 0) {
    std::string known;
    ((known += known.empty() ? F::name : std::string(", ") + F::name), ...);
    fail(what, " must be one of ", known, ", got '", name, "'");
  }
  return found;
}

// The index of a magnitude and weighting in Magnitudes followed by WeightedMagnitudes.
inline int magnitude_index(const std::string& magnitude, const std::string& weighting) {
  const int own = index_of(portable::Magnitudes{}, magnitude, "magnitude");
  if (weighting == "none" || weighting == "linear")
    return own;
  const int first = static_cast<int>(portable::Magnitudes::size);
  DCCONV_CHECK(
      weighting == "product" || weighting == "separate",
      "weighting must be one of none, linear, product, separate, got '",
      weighting,
      "'"
  );
  DCCONV_CHECK(
      magnitude == portable::TanhProduct::name,
      "magnitude must be 'tanh' for weighting '",
      weighting,
      "', got '",
      magnitude,
      "'"
  );
  return weighting == "product" ? first : first + 1;
}

inline int angular_index(const std::string& angular) {
  return index_of(portable::Angulars{}, angular, "angular");
}

inline PaddingMode padding_mode_of(const std::string& name) {
  if (name == "zeros")
    return PaddingMode::zeros;
  if (name == "reflect")
    return PaddingMode::reflect;
  if (name == "replicate")
    return PaddingMode::replicate;
  DCCONV_CHECK(
      name == "circular",
      "padding_mode must be one of zeros, reflect, replicate, circular, got '",
      name,
      "'"
  );
  return PaddingMode::circular;
}

// A number of pixels; `low` is 0 or 1.
inline void check_pixels(const char* name, int64_t value, int64_t low) {
  DCCONV_CHECK(
      value >= low && value <= kMostPixels,
      name,
      " must be at least ",
      low,
      " and below 2^31, got ",
      value
  );
}

inline Axis axis_of(
    int64_t input,
    int64_t kernel,
    int64_t stride,
    int64_t before,
    int64_t after,
    int64_t dilation,
    PaddingMode mode
) {
  DCCONV_CHECK(
      input >= 0 && input <= kMostElements,
      "a row or column of x must have 0 to 2^50 elements, got ",
      input
  );
  check_pixels("kernel_size", kernel, 1);
  check_pixels("stride", stride, 1);
  check_pixels("padding", before, 0);
  check_pixels("padding", after, 0);
  check_pixels("dilation", dilation, 1);
  Axis axis{input, 0, kernel, stride, dilation, before, after, mode};
  const int64_t padded = axis.padded(), extent = dilation * (kernel - 1) + 1;
  DCCONV_CHECK(
      padded >= extent,
      "x must be at least as large as the dilated kernel ",
      extent,
      " after padding, got ",
      padded
  );
  axis.output = (padded - extent) / stride + 1;
  // Beyond the last pixel no stride differs from another, nor does a dilation without a second tap:
  // tables and loops over either stay as small as the image.
  axis.stride = stride < padded ? stride : padded;
  axis.dilation = kernel > 1 ? dilation : 1;
  const int64_t edge = before > after ? before : after;
  DCCONV_CHECK(
      mode != PaddingMode::reflect || edge < input || edge == 0,
      "padding must be below the size ",
      input,
      " for 'reflect', got ",
      edge
  );
  DCCONV_CHECK(
      mode != PaddingMode::circular || edge <= input,
      "padding must be at most the size ",
      input,
      " for 'circular', got ",
      edge
  );
  DCCONV_CHECK(
      mode != PaddingMode::replicate || edge == 0 || input > 0,
      "x must have a size of at least 1 for 'replicate', got ",
      input
  );
  return axis;
}

// The shape of a call; n, c, h, w: sizes of the unpadded input.
inline ConvShape conv_shape(
    int64_t n,
    int64_t c,
    int64_t h,
    int64_t w,
    int64_t o,
    const Ints& kernel,
    const Ints& stride,
    const Ints& padding,
    const Ints& dilation,
    int64_t groups,
    const std::string& padding_mode,
    bool channels_last
) {
  DCCONV_CHECK(kernel.size() == 2, "kernel_size must be 2 numbers, got ", list_of(kernel));
  DCCONV_CHECK(stride.size() == 2, "stride must be 2 numbers, got ", list_of(stride));
  DCCONV_CHECK(padding.size() == 4, "padding must be 4 numbers, got ", list_of(padding));
  DCCONV_CHECK(dilation.size() == 2, "dilation must be 2 numbers, got ", list_of(dilation));
  check_groups(groups, c);
  DCCONV_CHECK(
      o > 0 && o % groups == 0, "groups must divide the ", o, " filters of weight, got ", groups
  );
  const PaddingMode mode = padding_mode_of(padding_mode);
  const ConvShape shape{
      n,
      c,
      o,
      groups,
      axis_of(h, kernel[0], stride[0], padding[0], padding[1], dilation[0], mode),
      axis_of(w, kernel[1], stride[1], padding[2], padding[3], dilation[1], mode),
      channels_last
  };
  const int64_t rows = shape.rows.padded(), columns = shape.columns.padded();
  DCCONV_CHECK(
      is_countable({n, c, rows, columns}),
      "padding must leave x at most 2^50 elements, got ",
      list_of(Ints{n, c, rows, columns})
  );
  DCCONV_CHECK(
      is_countable({n, o, shape.rows.output, shape.columns.output}),
      "the result must have at most 2^50 elements, got ",
      list_of(Ints{n, o, shape.rows.output, shape.columns.output})
  );
  DCCONV_CHECK(
      is_countable({o, c / groups, kernel[0], kernel[1]}),
      "filters must have at most 2^50 elements, got ",
      list_of(Ints{o, c / groups, kernel[0], kernel[1]})
  );
  return shape;
}

inline ConvShape conv_shape(
    const torch::stable::Tensor& x,
    int64_t o,
    const Ints& kernel,
    const Ints& stride,
    const Ints& padding,
    const Ints& dilation,
    int64_t groups,
    const std::string& padding_mode,
    bool channels_last
) {
  DCCONV_CHECK(x.dim() == 4, "x must have 4 dimensions, got ", x.dim());
  return conv_shape(
      x.size(0),
      x.size(1),
      x.size(2),
      x.size(3),
      o,
      kernel,
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      channels_last
  );
}

}  // namespace dcconv
