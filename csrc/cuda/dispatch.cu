// The passes by dtype.

#include "cuda/support/typed.h"

namespace dcconv::cuda {
namespace {

// f(a value of the compute dtype)
template <class F>
void with_compute(Dtype dtype, F&& f) {
  if (dtype == Dtype::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void pixel_sumsq(Dtype dtype, const PixelSumsqParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { pixel_sumsq_typed<decltype(t)>(p, stream); });
}

void affine_relu(Dtype dtype, const AffineReluParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { affine_relu_typed<decltype(t)>(p, stream); });
}

void window_norm(Dtype dtype, const WindowNormParams& p, Stream stream) {
  with_compute(dtype, [&](auto a) { window_norm_typed<decltype(a)>(p, stream); });
}

void filter_norm(Dtype dtype, const FilterNormParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { filter_norm_typed<decltype(t)>(p, stream); });
}

void epilogue(Dtype dtype, const EpilogueParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { epilogue_typed<decltype(t)>(p, stream); });
}

void grad_dot(Dtype dtype, const GradDotParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) {
    if (!grad_dot_elementwise_typed<decltype(t)>(p, stream))
      grad_dot_typed<decltype(t)>(p, stream);
  });
}

void column_sums(Dtype dtype, const ColumnSumsParams& p, Stream stream) {
  with_compute(dtype, [&](auto a) { column_sums_typed<decltype(a)>(p, stream); });
}

void filter_grad(Dtype dtype, const FilterGradParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { filter_grad_typed<decltype(t)>(p, stream); });
}

void grad_input(Dtype dtype, const GradInputParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { grad_input_typed<decltype(t)>(p, stream); });
}

}  // namespace dcconv::cuda
