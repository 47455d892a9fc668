// The library's convolution and its gradients, led around their faults.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "cpu/tensors.h"
#include "operator.h"
#include "shape.h"

namespace dcconv::cpu {

// Pad rows and columns: top, bottom, left, right.
inline Tensor pad(const Tensor& x, const ConvShape& shape) {
  const Ints edges{shape.columns.before, shape.columns.after, shape.rows.before, shape.rows.after};
  const char* modes[] = {"constant", "reflect", "replicate", "circular"};
  return dispatch_tensor(
      "aten::pad",
      "",
      x,
      edges,
      std::string(modes[static_cast<int>(shape.rows.mode)]),
      std::optional<double>()
  );
}

// Output columns up to which the library's bfloat16 convolutions with a stride along the columns
// are not trusted: wrong ones are one or two wide.
constexpr int64_t kNarrow = 3;

struct LibraryGeometry {
  Ints stride, padding, dilation;
  int64_t groups;
};

// Whether the layout of the library's result is channels_last: either operand decides.
inline bool result_is_last(const Tensor& x, const Tensor& weight) {
  return is_channels_last(x) || is_channels_last(weight);
}

// Where the library's bfloat16 convolutions with few output columns are wrong, the route is
// float32: see docs/library-faults.md. Sizes in pixels.
inline bool takes_float(
    const Tensor& x, const Tensor& weight, int64_t output_columns, const LibraryGeometry& g
) {
  return x.scalar_type() == ScalarType::BFloat16 && output_columns <= kNarrow && g.stride[1] > 1 &&
         (weight.size(2) > 1 || weight.size(3) > 1);
}

inline Tensor to_float(const Tensor& t) {
  return to_dtype(t, ScalarType::Float);
}

inline Tensor library_convolution(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const LibraryGeometry& g
) {
  return dispatch_tensor(
      "aten::convolution",
      "",
      x,
      weight,
      bias,
      g.stride,
      g.padding,
      g.dilation,
      false,
      Ints{0, 0},
      g.groups
  );
}

inline Tensor convolution(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const LibraryGeometry& g
) {
  const bool last = result_is_last(x, weight);
  const Tensor fitted_x = with_exact_strides(x, last);
  const Tensor fitted_weight = with_exact_strides(weight, last);
  const int64_t extent = g.dilation[1] * (weight.size(3) - 1) + 1;
  const int64_t columns = (x.size(3) + 2 * g.padding[1] - extent) / g.stride[1] + 1;
  if (!takes_float(x, weight, columns, g))
    return library_convolution(fitted_x, fitted_weight, bias, g);
  std::optional<Tensor> float_bias;
  if (bias.has_value())
    float_bias = to_float(*bias);
  return to_dtype(
      library_convolution(to_float(fitted_x), to_float(fitted_weight), float_bias, g),
      ScalarType::BFloat16
  );
}

using ConvolutionGradients = std::tuple<Tensor, Tensor, Tensor>;

inline ConvolutionGradients library_gradients(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    const LibraryGeometry& g,
    std::array<bool, 3> wanted
) {
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  const std::optional<Ints> bias_sizes =
      wanted[2] ? std::optional<Ints>(Ints{weight.size(0)}) : std::nullopt;
  auto stack = dispatch<3>(
      "aten::convolution_backward",
      "",
      grad,
      x,
      weight,
      bias_sizes,
      g.stride,
      g.padding,
      g.dilation,
      false,
      Ints{0, 0},
      g.groups,
      mask
  );
  return {
      torch::stable::detail::to<Tensor>(stack[0]),
      torch::stable::detail::to<Tensor>(stack[1]),
      torch::stable::detail::to<Tensor>(stack[2])
  };
}

// The same in float32, rounded once.
inline ConvolutionGradients float_gradients(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    const LibraryGeometry& g,
    std::array<bool, 3> wanted
) {
  auto [of_x, of_weight, of_bias] =
      library_gradients(to_float(grad), to_float(x), to_float(weight), g, wanted);
  const auto rounded = [](bool there, const Tensor& t) {
    return there ? to_dtype(t, ScalarType::BFloat16) : t;
  };
  return {rounded(wanted[0], of_x), rounded(wanted[1], of_weight), rounded(wanted[2], of_bias)};
}

// The pixels of x that windows of one pixel start at, dense.
inline Tensor strided_pixels(const Tensor& x, const Ints& stride, bool channels_last) {
  Tensor t = x;
  for (int64_t axis : {2, 3})
    t = dispatch_tensor(
        "aten::slice",
        "Tensor",
        t,
        axis,
        std::optional<int64_t>(0),
        std::optional<int64_t>(x.size(axis)),
        stride[static_cast<std::size_t>(axis - 2)]
    );
  return with_exact_strides(contiguous(t, channels_last), channels_last);
}

// Gradients with respect to input, weight and bias; those not wanted are undefined tensors. Where
// the library's own is wrong, or writes beside its memory, another route leads to it: the corners
// are listed in docs/library-faults.md.
inline ConvolutionGradients convolution_backward(
    const Tensor& any_grad,
    const Tensor& any_x,
    const Tensor& any_weight,
    const LibraryGeometry& g,
    std::array<bool, 3> wanted
) {
  const bool last = result_is_last(any_x, any_weight);
  const Tensor grad = with_exact_strides(any_grad, last);
  const Tensor x = with_exact_strides(any_x, last);
  const Tensor weight = with_exact_strides(any_weight, last);
  if (takes_float(x, weight, grad.size(3), g))
    return float_gradients(grad, x, weight, g, wanted);
  const bool pointwise = weight.size(2) == 1 && weight.size(3) == 1;
  const bool gathered = wanted[1] && pointwise && (g.stride[0] > 1 || g.stride[1] > 1) &&
                        g.padding[0] == 0 && g.padding[1] == 0 && x.size(0) > 0;
  const bool in_float =
      wanted[1] && g.groups > 1 && g.dilation[0] > 1 && x.scalar_type() == ScalarType::BFloat16;
  if (!gathered && !in_float)
    return library_gradients(grad, x, weight, g, wanted);
  ConvolutionGradients others, of_weight;
  const std::array<bool, 3> weight_only{false, true, false};
  if (wanted[0] || wanted[2])
    others = library_gradients(grad, x, weight, g, {wanted[0], false, wanted[2]});
  if (gathered) {
    const LibraryGeometry dense{{1, 1}, {0, 0}, {1, 1}, g.groups};
    of_weight =
        library_gradients(grad, strided_pixels(x, g.stride, last), weight, dense, weight_only);
  } else {
    of_weight = float_gradients(grad, x, weight, g, weight_only);
  }
  return {std::get<0>(others), std::get<1>(of_weight), std::get<2>(others)};
}

// Whether the library has bfloat16 convolutions for this processor, beside plain loops. Python asks
// it and says so (dcconv/operator/convolution.py), for the reference takes the same way.
inline std::atomic<bool>& library_has_bfloat16() {
  static std::atomic<bool> has{true};
  return has;
}

// Libraries compute float16 convolutions of CPUs without float16 arithmetic some 100 times slower
// than float32 ones (measured: 781 ms against 3.9 ms for one backward of [8, 32, 28, 28]), and
// bfloat16 ones without AVX-512 some ten times (133 ms against 15 for one forward of
// [8, 64, 56, 56] -> 64, 3x3, AVX2, two threads).
inline ScalarType library_type(Dtype dtype, ScalarType storage) {
  const bool in_float =
      dtype == Dtype::f16 || (dtype == Dtype::bf16 && !library_has_bfloat16().load());
  return in_float ? ScalarType::Float : storage;
}

}  // namespace dcconv::cpu
