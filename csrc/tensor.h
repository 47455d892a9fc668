// Tensors of any device: PyTorch operations through the stable dispatcher, dtypes and layouts.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "operator.h"

namespace dcconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Raises why the latest call into PyTorch failed, in one line. PyTorch's own checks of such calls
// also print the stack of the call, and name files of the machine that compiled them. PyTorch says
// why from 2.13 on.
[[noreturn]] inline void library_failed(const std::string& call) {
  using What = const char* (*)();
  static const What what =
      reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* found = what == nullptr ? nullptr : what();
  std::string text = found == nullptr ? "" : found;
  text = text.substr(0, text.find('\n'));
  // Callers look for these words of PyTorch's own error to take a smaller batch.
  const std::size_t words = text.find("DefaultCPUAllocator: can't allocate memory");
  if (words != std::string::npos)
    fail(text.substr(words));
  if (text.find("out of memory") != std::string::npos)
    fail(text);
  if (text.find("std::bad_alloc") != std::string::npos)
    no_memory();
  fail(call, " failed", text.empty() ? "" : ": ", text);
}

template <std::size_t kResults, class... Args>
std::array<StableIValue, (sizeof...(Args) > kResults ? sizeof...(Args) : kResults)>
dispatch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > kResults ? sizeof...(Args) : kResults)> stack{
      torch::stable::detail::from(args)...
  };
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    library_failed(name);
  return stack;
}

template <class... Args>
Tensor dispatch_tensor(const char* name, const char* overload, const Args&... args) {
  return torch::stable::detail::to<Tensor>(dispatch<1>(name, overload, args...)[0]);
}

// fill_ of PyTorch.
inline Tensor filled(const Tensor& t, double value) {
  if (aoti_torch_aten_fill__Scalar(t.get(), value) != TORCH_SUCCESS)
    library_failed("aten::fill_");
  return t;
}

// An op that says in one sentence that it has no memory for the values that it keeps for a while.
template <auto kOp>
struct Guarded;

template <class Result, class... Args, Result (*kOp)(Args...)>
struct Guarded<kOp> {
  static Result run(Args... args) {
    try {
      return kOp(std::move(args)...);
    } catch (const std::bad_alloc&) {
      no_memory();
    } catch (const std::length_error&) {
      no_memory();
    }
  }
};

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

// The strides that PyTorch gives a new tensor of a layout.
inline Ints strides_of(const Ints& sizes, bool channels_last) {
  Ints strides(sizes.size());
  int64_t next = 1;
  if (channels_last) {
    for (std::size_t axis : {1, 3, 2, 0}) {
      strides[axis] = next;
      next *= sizes[axis];
    }
  } else {
    for (std::size_t axis = sizes.size(); axis-- > 0;) {
      strides[axis] = next;
      next *= std::max<int64_t>(sizes[axis], 1);
    }
  }
  return strides;
}

inline Tensor empty_on(
    const std::optional<torch::stable::Device>& device,
    const Ints& sizes,
    ScalarType dtype,
    bool channels_last
) {
  return dispatch_tensor(
      "aten::empty",
      "memory_format",
      sizes,
      std::optional<ScalarType>(dtype),
      std::optional<torch::headeronly::Layout>(),
      device,
      std::optional<bool>(),
      std::optional<MemoryFormat>(format_of(channels_last))
  );
}

// A dtype as Python calls it.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
  case ScalarType::Double:
    return "float64";
  case ScalarType::Float:
    return "float32";
  case ScalarType::BFloat16:
    return "bfloat16";
  case ScalarType::Half:
    return "float16";
  default:
    return torch::headeronly::toString(dtype);
  }
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
    fail(
        "a tensor must have dtype float16, bfloat16, float32 or float64, got ",
        name_of(t.scalar_type())
    );
  }
}

inline void check_dimensions(const Tensor& t, int64_t count, const char* name) {
  DCCONV_CHECK(
      t.dim() == count, name, " must have ", count, " dimensions, got ", list_of(t.sizes())
  );
}

inline void check_sizes(const Tensor& t, const Ints& sizes, const char* name) {
  const auto got = t.sizes();
  DCCONV_CHECK(
      std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()),
      name,
      " must have shape ",
      list_of(sizes),
      ", got ",
      list_of(got)
  );
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  DCCONV_CHECK(
      t.scalar_type() == dtype,
      name,
      " must have dtype ",
      name_of(dtype),
      ", got ",
      name_of(t.scalar_type())
  );
}

inline Ints sizes_of(const Tensor& t) {
  return Ints(t.sizes().begin(), t.sizes().end());
}

// A filter tensor [o, c / groups, r, s] that fits x, [n, c, h, w].
inline void check_weight(const Tensor& x, const Tensor& weight, int64_t groups) {
  check_dimensions(x, 4, "x");
  check_dimensions(weight, 4, "weight");
  check_dtype(weight, x.scalar_type(), "weight");
  const int64_t channels = x.size(1);
  check_groups(groups, channels);
  DCCONV_CHECK(
      weight.size(1) == channels / groups,
      "weight.size(1) must be in_channels / groups = ",
      channels / groups,
      ", got ",
      weight.size(1)
  );
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t o, ScalarType dtype) {
  if (!bias.has_value())
    return;
  check_sizes(*bias, {o}, "bias");
  check_dtype(*bias, dtype, "bias");
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

inline void check_dense(const Tensor& t, const Tensor& like, bool channels_last, const char* name) {
  check_dimensions(t, 4, name);
  check_dtype(t, like.scalar_type(), name);
  DCCONV_CHECK(
      is_dense(t, channels_last),
      name,
      " must be dense in the layout of the call, ",
      channels_last ? "channels_last" : "contiguous",
      ", got shape ",
      list_of(t.sizes()),
      " with strides ",
      list_of(t.strides())
  );
}

// Dense in the layout: t itself where it is, without PyTorch's dispatcher, which takes a
// microsecond to say so.
inline Tensor contiguous(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last) && (t.numel() > 0 || !channels_last))
    return t;
  return dispatch_tensor("aten::contiguous", "", t, format_of(channels_last));
}

}  // namespace dcconv
