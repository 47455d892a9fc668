// What becomes of tensors for the library, and of its results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/call.h"

namespace dcconv::cpu {

// Convert a dense tensor between storage and library dtype, same layout.
inline Tensor as_library(const Call& call, const Tensor& t) {
  return call.library == call.storage ? t : to_dtype(t, call.library);
}

inline Tensor library_input(const Call& call, const Tensor& x) {
  const Tensor converted = as_library(call, x);
  return call.pad ? pad(converted, call.shape) : converted;
}

inline char* at(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
}

// The library may number the strides of one-element axes its own way: give the tensor exactly the
// strides that empty() gives, which the fakes promise.
inline Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  const auto a = t.strides(), b = like.strides();
  if (std::equal(a.begin(), a.end(), b.begin()))
    return t;
  return dispatch_tensor(
      "aten::as_strided",
      "",
      t,
      Ints(t.sizes().begin(), t.sizes().end()),
      Ints(b.begin(), b.end()),
      std::optional<int64_t>()
  );
}

}  // namespace dcconv::cpu
