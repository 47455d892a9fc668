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

}  // namespace dcconv::cpu
