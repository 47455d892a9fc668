// PyTorch operations that the CPU ops call and tensor helpers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "tensor.h"

namespace dcconv {
namespace cpu {

inline Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last = false) {
  return empty_on(std::nullopt, sizes, dtype, channels_last);
}

// Images [first, first + count) of a batch, a view.
inline Tensor images(const Tensor& t, int64_t first, int64_t count) {
  if (first == 0 && count == t.size(0))
    return t;
  return dispatch_tensor(
      "aten::slice",
      "Tensor",
      t,
      int64_t{0},
      std::optional<int64_t>(first),
      std::optional<int64_t>(first + count),
      int64_t{1}
  );
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return dispatch_tensor(
      "aten::to", "dtype", t, dtype, false, false, std::optional<MemoryFormat>()
  );
}

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

struct LibraryGeometry {
  Ints stride, padding, dilation;
  int64_t groups;
};

inline Tensor convolution(
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

using ConvolutionGradients = std::tuple<Tensor, Tensor, Tensor>;

inline ConvolutionGradients library_backward(
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

// Gradients with respect to input, weight and bias; those not wanted are undefined tensors.
inline ConvolutionGradients convolution_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    const LibraryGeometry& g,
    std::array<bool, 3> wanted
) {
  // The library's bfloat16 gradient of a grouped convolution's weight takes part of its sums from
  // memory that nobody wrote, where rows are dilated (PyTorch 2.13 and 2.15, AVX-512:
  // channels_last, stride 1, rows of 29 outputs and more). Its float32 gradient is right.
  const bool in_float =
      wanted[1] && g.groups > 1 && g.dilation[0] > 1 && grad.scalar_type() == ScalarType::BFloat16;
  if (!in_float)
    return library_backward(grad, x, weight, g, wanted);
  const auto to_float = [](const Tensor& t) { return to_dtype(t, ScalarType::Float); };
  ConvolutionGradients others;
  if (wanted[0] || wanted[2])
    others = library_backward(grad, x, weight, g, {wanted[0], false, wanted[2]});
  const ConvolutionGradients of_weight =
      library_backward(to_float(grad), to_float(x), to_float(weight), g, {false, true, false});
  return {
      std::get<0>(others),
      to_dtype(std::get<1>(of_weight), ScalarType::BFloat16),
      std::get<2>(others)
  };
}

// Libraries compute float16 convolutions of CPUs without float16 arithmetic some 100 times slower
// than float32 ones (measured: 781 ms against 3.9 ms for one backward of [8, 32, 28, 28]).
inline ScalarType library_type(Dtype dtype, ScalarType storage) {
  return dtype == Dtype::f16 ? ScalarType::Float : storage;
}

// Threads take at least `grain` tasks each; fewer tasks than that run on the caller.
template <class Kernel>
void run_tasks(int64_t tasks, const Kernel& kernel, int64_t grain = 1) {
  const auto run = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Kernel*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&kernel));
  if (torch_parallel_for(0, tasks, grain, run, context) != TORCH_SUCCESS)
    library_failed("parallel_for");
}

// The kernels of the chosen instruction set.
const Kernels& kernels(Dtype dtype);

}  // namespace cpu
}  // namespace dcconv
