// One function per pass and dtype, each instantiated in a file of the folder `instances`, and the
// choice between dtypes.
#pragma once

#include "cuda/kernels.h"
#include "storage.h"

namespace dcconv::cuda {

// f(a value of the storage dtype)
template <class F>
void with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
  case Dtype::f64:
    return f(double{});
  case Dtype::f32:
    return f(float{});
  case Dtype::bf16:
    return f(BFloat16{});
  case Dtype::f16:
    return f(Half{});
  }
}

// T: storage dtype
template <class T>
void pixel_sumsq_typed(const PixelSumsqParams& p, Stream stream);
template <class T>
void affine_relu_typed(const AffineReluParams& p, Stream stream);
template <class T>
void filter_norm_typed(const FilterNormParams& p, Stream stream);
template <class T>
void epilogue_typed(const EpilogueParams& p, Stream stream);
template <class T>
void grad_dot_typed(const GradDotParams& p, Stream stream);
template <class T>
void filter_grad_typed(const FilterGradParams& p, Stream stream);
template <class T>
void grad_input_typed(const GradInputParams& p, Stream stream);
template <class T>
void implicit_gemm_typed(const FusedParams& p, int tile, Stream stream);
template <class T>
void implicit_gemm_grad_input_typed(const FusedGradInputParams& p, int tile, Stream stream);
template <class T>
bool grad_dot_elementwise_typed(const GradDotParams& p, Stream stream);  // whether it ran
template <class T>
void depthwise_typed(const FusedParams& p, Stream stream);
template <class T>
void stem_typed(const FusedParams& p, Stream stream);
template <class T>
void depthwise_grad_input_typed(const FusedGradInputParams& p, Stream stream);
template <class T>
void depthwise_grad_weight_typed(const DepthwiseGradWeightParams& p, Stream stream);

// A: compute dtype
template <class A>
void window_norm_typed(const WindowNormParams& p, Stream stream);
template <class A>
void column_sums_typed(const ColumnSumsParams& p, Stream stream);

}  // namespace dcconv::cuda
