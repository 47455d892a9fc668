// The affine map of channels with a ReLU behind it, and the sums of squares of its result, as an
// op.

#include "affine_relu.h"

#include <tuple>

#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace dcconv::cpu {
namespace {

std::tuple<Tensor, Tensor>
affine_relu(Tensor x, Tensor scale, Tensor shift, int64_t groups, bool channels_last) {
  check_affine_relu(x, scale, shift, groups, channels_last);
  const Dtype dtype = dtype_of(x);
  scale = contiguous(scale, false);
  shift = contiguous(shift, false);
  AffineReluParams p{};
  p.n = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  p.c = x.size(1);
  p.groups = groups;
  p.channels_last = channels_last;
  Tensor y = empty(sizes_of(x), x.scalar_type(), channels_last);
  Tensor sums = empty({p.n * p.pixels * groups}, compute_type(dtype));
  p.x = x.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.shift = shift.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  const Kernels& table = kernels(dtype);
  run_tasks(p.squares().tasks(), [&](int64_t begin, int64_t end) {
    table.affine_relu(p, begin, end);
  });
  return {y, sums};
}

}  // namespace
}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("affine_relu", TORCH_BOX(&dcconv::Guarded<&dcconv::cpu::affine_relu>::run));
}
