// The passes for float32 and bfloat16 alone, in one file, for builds that are slow; for float32
// alone under SIMT_ONE_DTYPE, for builds that are many.

#include <stdexcept>

#include "cuda/passes/affine_relu.cuh"
#include "cuda/passes/column_sums.cuh"
#include "cuda/passes/epilogue.cuh"
#include "cuda/passes/filter.cuh"
#include "cuda/passes/grad_dot.cuh"
#include "cuda/passes/grad_input.cuh"
#include "cuda/passes/pixel_sumsq.cuh"
#include "cuda/passes/window_norm.cuh"

namespace dcconv::cuda {
namespace {

template <class F>
void with_storage(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32)
    return f(float{});
#if !defined(SIMT_ONE_DTYPE)
  if (dtype == Dtype::bf16)
    return f(BFloat16{});
#endif
  throw std::invalid_argument("simt: this build has not every dtype");
}

}  // namespace

void pixel_sumsq(Dtype dtype, const PixelSumsqParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { pixel_sumsq_typed<decltype(t)>(p, stream); });
}

void affine_relu(Dtype dtype, const AffineReluParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { affine_relu_typed<decltype(t)>(p, stream); });
}

int64_t window_norm_blocks(const WindowNormParams& p) {
  return window_norm_grid(p);
}

void window_norm(Dtype, const WindowNormParams& p, Stream stream) {
  window_norm_typed<float>(p, stream);
}

void filter_norm(Dtype dtype, const FilterNormParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { filter_norm_typed<decltype(t)>(p, stream); });
}

void epilogue(Dtype dtype, const EpilogueParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { epilogue_typed<decltype(t)>(p, stream); });
}

void grad_dot(Dtype dtype, const GradDotParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { grad_dot_typed<decltype(t)>(p, stream); });
}

void column_sums(Dtype, const ColumnSumsParams& p, Stream stream) {
  column_sums_typed<float>(p, stream);
}

void filter_grad(Dtype dtype, const FilterGradParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { filter_grad_typed<decltype(t)>(p, stream); });
}

void grad_input(Dtype dtype, const GradInputParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { grad_input_typed<decltype(t)>(p, stream); });
}

}  // namespace dcconv::cuda
