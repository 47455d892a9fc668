// Tensors of any device: PyTorch operations through the stable dispatcher, dtypes and layouts.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "operator.h"

namespace dcconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

template <std::size_t kResults, class... Args>
std::array<StableIValue, (sizeof...(Args) > kResults ? sizeof...(Args) : kResults)>
dispatch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > kResults ? sizeof...(Args) : kResults)> stack{
      torch::stable::detail::from(args)...
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

template <class... Args>
Tensor dispatch_tensor(const char* name, const char* overload, const Args&... args) {
  return torch::stable::detail::to<Tensor>(dispatch<1>(name, overload, args...)[0]);
}

// PyTorch's rule for the layout that a tensor's strides suggest.
inline bool is_channels_last(const Tensor& t) {
  int64_t smallest = 0;
  for (int axis : {1, 3, 2, 0}) {
    const int64_t size = t.size(axis), stride = t.stride(axis);
    if (size == 0 || stride < smallest)
      return false;
    if (axis == 0 && smallest == t.stride(1))
      return false;
    smallest = size > 1 ? stride * size : stride;
  }
  return t.stride(1) != 0;
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor contiguous(const Tensor& t, bool channels_last) {
  return dispatch_tensor("aten::contiguous", "", t, format_of(channels_last));
}

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
  case ScalarType::Double:
    return Dtype::f64;
  case ScalarType::Float:
    return Dtype::f32;
  case ScalarType::BFloat16:
    return Dtype::bf16;
  case ScalarType::Half:
    return Dtype::f16;
  default:
    STD_TORCH_CHECK(false, "dcconv: x must have a floating dtype");
  }
}

inline ScalarType compute_type(Dtype dtype) {
  return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

// Whether memory holds the elements in exactly the order of the layout, one after the other.
inline bool is_dense(const Tensor& t, bool channels_last) {
  if (t.numel() == 0)
    return true;
  int64_t expected = 1;
  const bool last = channels_last && t.dim() == 4;
  const std::array<int64_t, 4> order{1, 3, 2, 0};
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t axis = last ? order[static_cast<std::size_t>(i)] : t.dim() - 1 - i;
    if (t.size(axis) != 1 && t.stride(axis) != expected)
      return false;
    expected *= t.size(axis);
  }
  return true;
}

}  // namespace dcconv
