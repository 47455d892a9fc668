// Reads an op's arguments into plain structs. Python has checked what the user typed; the checks
// here guard memory.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "functions.h"
#include "shape.h"

namespace dcconv {

using Ints = std::vector<int64_t>;

template <class... F>
int index_of(portable::TypeList<F...>, const std::string& name, const char* what) {
  int index = 0, found = -1;
  ((name == F::name ? found = index : 0, ++index), ...);
  STD_TORCH_CHECK(found >= 0, "dcconv: unknown ", what, " '", name, "'");
  return found;
}

// The index of a magnitude and weighting in Magnitudes followed by WeightedMagnitudes.
inline int magnitude_index(const std::string& magnitude, const std::string& weighting) {
  const int own = index_of(portable::Magnitudes{}, magnitude, "magnitude");
  if (weighting == "none" || weighting == "linear")
    return own;
  const int first = static_cast<int>(portable::Magnitudes::size);
  STD_TORCH_CHECK(
      magnitude == portable::TanhProduct::name,
      "dcconv: weighting '",
      weighting,
      "' needs magnitude 'tanh'"
  );
  if (weighting == "product")
    return first;
  STD_TORCH_CHECK(weighting == "separate", "dcconv: unknown weighting '", weighting, "'");
  return first + 1;
}

inline PaddingMode padding_mode_of(const std::string& name) {
  if (name == "zeros")
    return PaddingMode::zeros;
  if (name == "reflect")
    return PaddingMode::reflect;
  if (name == "replicate")
    return PaddingMode::replicate;
  STD_TORCH_CHECK(name == "circular", "dcconv: unknown padding mode '", name, "'");
  return PaddingMode::circular;
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
  STD_TORCH_CHECK(
      kernel > 0 && stride > 0 && dilation > 0 && before >= 0 && after >= 0,
      "dcconv: bad window geometry"
  );
  Axis axis{input, 0, kernel, stride, dilation, before, after, mode};
  axis.output = (axis.padded() - dilation * (kernel - 1) - 1) / stride + 1;
  STD_TORCH_CHECK(axis.padded() >= dilation * (kernel - 1) + 1, "dcconv: empty output");
  const int64_t edge = before > after ? before : after;
  STD_TORCH_CHECK(
      mode != PaddingMode::reflect || edge < input || edge == 0, "dcconv: reflect padding too large"
  );
  STD_TORCH_CHECK(
      mode != PaddingMode::circular || edge <= input, "dcconv: circular padding too large"
  );
  return axis;
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
  STD_TORCH_CHECK(x.dim() == 4, "dcconv: x must be 4-d");
  STD_TORCH_CHECK(
      kernel.size() == 2 && stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
      "dcconv: geometry must come as 2, 2, 4 and 2 numbers"
  );
  STD_TORCH_CHECK(
      groups > 0 && x.size(1) % groups == 0 && o % groups == 0 && x.size(1) > 0 && o > 0,
      "dcconv: groups must divide channels and filters, and there must be some"
  );
  const PaddingMode mode = padding_mode_of(padding_mode);
  return {
      x.size(0),
      x.size(1),
      o,
      groups,
      axis_of(x.size(2), kernel[0], stride[0], padding[0], padding[1], dilation[0], mode),
      axis_of(x.size(3), kernel[1], stride[1], padding[2], padding[3], dilation[1], mode),
      channels_last
  };
}

}  // namespace dcconv
