// What the op affine_relu requires of its arguments, on any device.
#pragma once

#include "tensor.h"

namespace dcconv {

inline void check_affine_relu(
    const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t groups, bool channels_last
) {
  const Dtype dtype = dtype_of(x);
  check_dense(x, x, channels_last, "x");
  const int64_t channels = x.size(1);
  check_groups(groups, channels);
  DCCONV_CHECK(
      is_countable({x.size(0), channels, x.size(2), x.size(3)}),
      "x must have at most 2^50 elements, got ",
      list_of(x.sizes())
  );
  check_sizes(scale, {channels}, "scale");
  check_dtype(scale, compute_type(dtype), "scale");
  check_sizes(shift, {channels}, "shift");
  check_dtype(shift, compute_type(dtype), "shift");
}

}  // namespace dcconv
