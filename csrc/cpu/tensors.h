// Tensors of the CPU: memory, views and conversions by PyTorch.
#pragma once

#include <cstdint>
#include <optional>

#include "tensor.h"

namespace dcconv::cpu {

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

}  // namespace dcconv::cpu
