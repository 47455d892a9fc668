// Tensors of the CPU: memory, views and conversions by PyTorch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "tensor.h"

namespace dcconv::cpu {

// Without PyTorch's dispatcher, which takes as long again.
inline Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last = false) {
  const Ints strides = strides_of(sizes, channels_last);
  AtenTensorHandle made = nullptr;
  const auto dimensions = static_cast<int64_t>(sizes.size());
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device = aoti_torch_device_type_cpu();
  if (aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(), type, device, 0, &made) !=
      TORCH_SUCCESS)
    library_failed("aten::empty");
  return Tensor(made);
}

// The tensor with the strides that empty() gives, which the fakes promise. Axes of one element may
// have any stride, as the batch axis of batch[0].unsqueeze(0) has, and `contiguous` leaves them;
// the library then takes the layout for another one (float64 and float16 gradients of grouped
// weights), and numbers those of its results its own way.
inline Tensor with_exact_strides(const Tensor& t, bool channels_last) {
  if (t.dim() != 4 || !is_dense(t, channels_last))
    return t;
  const Ints sizes = sizes_of(t), strides = strides_of(sizes, channels_last);
  if (std::equal(strides.begin(), strides.end(), t.strides().begin()))
    return t;
  return dispatch_tensor("aten::as_strided", "", t, sizes, strides, std::optional<int64_t>());
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
  if (t.scalar_type() == dtype)
    return t;
  return dispatch_tensor(
      "aten::to", "dtype", t, dtype, false, false, std::optional<MemoryFormat>()
  );
}

}  // namespace dcconv::cpu
