// The two directions of the operator on the CPU: their operands, and the strategies that compute
// them.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "cpu/call.h"

namespace dcconv::cpu {

struct ForwardInputs {
  Tensor x, weight;
  std::optional<Tensor> bias, radius, norm_mean, k;
  // Sums of squares per pixel and group of x, as PatchNorm takes them. Depthwise kernels find them
  // on their way and leave these alone.
  std::optional<Tensor> sums;
  double eps;
  bool batch_mean, keep_dot, keep_map;

  // Those from image `first` on; null where there are none.
  const void* sums_from(const ConvShape& shape, int64_t first) const {
    if (!sums.has_value())
      return nullptr;
    const int64_t offset = first * shape.input_pixels() * shape.groups;
    return static_cast<const char*>(sums->const_data_ptr()) +
           offset * static_cast<int64_t>(sums->element_size());
  }
};

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct BackwardInputs {
  Tensor grad_y, x, weight, kept, norm_map, mean;
  std::optional<Tensor> radius, norm_mean, k;
  double eps;
  bool batch_mean, norm_grad;
  Kept kept_is;
  int64_t needs;
};

using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Around the library's convolution, in chunks of images: every call. A: compute type.
template <class A>
ForwardResults library_forward(const Call& call, const ForwardInputs& in);
template <class A>
BackwardResults library_backward(const Call& call, const BackwardInputs& in);

// Fused, filters of one channel each: unless the library is forced.
bool takes_depthwise(const Call& call);
bool takes_depthwise_backward(const Call& call);
template <class A>
ForwardResults depthwise_forward(const Call& call, const ForwardInputs& in);
template <class A>
BackwardResults depthwise_backward(const Call& call, const BackwardInputs& in);

}  // namespace dcconv::cpu
