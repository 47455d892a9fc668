// What forward and backward of the operator on the CPU derive from their common arguments.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/library/chunk.h"
#include "cpu/library/library.h"
#include "cpu/strategies.h"
#include "cpu/tasks.h"

namespace dcconv::cpu {

// Bits of `needs`, in the order of the results of conv2d_backward.
enum Needs { kX = 1, kWeight = 2, kBias = 4, kRadius = 8, kNormMean = 16, kK = 32 };

// What forward and backward derive from their common arguments.
struct Call {
  ConvShape shape;
  Operator op;
  Dtype dtype;
  ScalarType storage, library, compute;
  const Kernels& table;
  LibraryGeometry geometry;
  bool pad;          // x is padded for the library
  bool norm_free;    // linear x cosine: the patch norm cancels
  bool scaled_by_a;  // norm_free: the weight is divided by its norm
  bool weight_last;  // layout in which weights are read
  int64_t chunk;     // images at a time

  int64_t output_elements() const { return shape.positions() * shape.o; }
  int64_t map_elements() const { return shape.positions() * shape.groups; }
  int64_t sums_elements() const { return shape.n * shape.input_pixels() * shape.groups; }
};

inline Call make_call(
    const Tensor& x,
    const Tensor& weight,
    const Ints& stride,
    const Ints& padding,
    const Ints& dilation,
    int64_t groups,
    const std::string& padding_mode,
    const std::string& magnitude,
    const std::string& angular,
    const std::string& weighting,
    double alpha,
    double beta,
    double power,
    double delta,
    bool backward
) {
  check_weight(x, weight, groups);
  const bool channels_last = x.size(0) > 0 && (is_channels_last(x) || is_channels_last(weight));
  const ConvShape shape = conv_shape(
      x,
      weight.size(0),
      {weight.size(2), weight.size(3)},
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      channels_last
  );
  const Dtype dtype = dtype_of(x);
  const bool symmetric = shape.rows.mode == PaddingMode::zeros &&
                         shape.rows.before == shape.rows.after &&
                         shape.columns.before == shape.columns.after;
  const Ints library_padding =
      symmetric ? Ints{shape.rows.before, shape.columns.before} : Ints{0, 0};
  const ScalarType storage = x.scalar_type(), library = library_type(dtype, storage);
  const int64_t element = dtype == Dtype::f64 ? 8 : library == ScalarType::Float ? 4 : 2;
  const bool norm_free = magnitude == portable::Linear::name && angular == portable::Cosine::name &&
                         (weighting == "none" || weighting == "linear");
  const int64_t input_bytes = element * shape.c * shape.input_pixels();
  const int64_t output_bytes = element * shape.o * shape.output_pixels();
  // Norm-free operators have no pass of their own to keep in cache.
  const int64_t chunk = norm_free && library == storage ? std::max<int64_t>(shape.n, 1)
                        : backward ? backward_chunk(shape.n, input_bytes, output_bytes)
                                   : forward_chunk(shape.n, output_bytes);
  return {
      shape,
      {magnitude_index(magnitude, weighting),
       angular_index(angular),
       weighting == "linear",
       alpha,
       beta,
       power,
       delta},
      dtype,
      storage,
      library,
      compute_type(dtype),
      kernels(dtype, library == ScalarType::Float),
      {{shape.rows.stride, shape.columns.stride},
       library_padding,
       {shape.rows.dilation, shape.columns.dilation},
       groups},
      !symmetric,
      norm_free,
      norm_free && weighting == "none",
      is_channels_last(weight),
      chunk
  };
}

}  // namespace dcconv::cpu
