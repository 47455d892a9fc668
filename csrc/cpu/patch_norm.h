// The norm pass over x and its gradient, for one range of images. Layouts as in kernels.h.
#pragma once

#include <vector>

#include "cpu/tasks.h"
#include "cpu/tensors.h"
#include "shape.h"

namespace dcconv::cpu {

// The pass of one geometry, with its index tables.
class PatchNorm {
public:
  PatchNorm(const ConvShape& shape, double eps);

  // b = sqrt(window sums of x^2 + eps) of `count` images; adds one sum per output row of every
  // plane to row_sums unless it is null. The output has n * groups * p * q elements. sums: of the
  // squares per pixel and group, null where they are to be found from x.
  void norms(
      const Kernels& kernels,
      const ConvShape& shape,
      int64_t count,
      const void* x,
      const void* sums,
      void* b,
      double* row_sums
  ) const;

  // Transposed window sums of t, one value per input pixel and group.
  Tensor transposed(
      const Kernels& kernels,
      const ConvShape& shape,
      int64_t count,
      const void* t,
      ScalarType compute
  ) const;

  int64_t planes(const ConvShape& shape, int64_t count) const {
    return shape.channels_last ? count : count * shape.groups;
  }

private:
  WindowParams params(const ConvShape& shape, int64_t count) const;

  std::vector<int64_t> row_sources_, column_sources_;
  double eps_;
};

// Which padded rows (or columns) show an input row, as offsets into one list.
struct Shown {
  explicit Shown(const Axis& axis);
  std::vector<int64_t> starts, list;
};

}  // namespace dcconv::cpu
