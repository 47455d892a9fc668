#include "cuda/passes/column_sums.cuh"
#include "cuda/passes/filter.cuh"
#include "cuda/passes/grad_input.cuh"
#include "cuda/passes/pixel_sumsq.cuh"
#include "cuda/passes/window_norm.cuh"
#include "cuda/support/typed.h"

namespace dcconv::cuda {

template void pixel_sumsq_typed<double>(const PixelSumsqParams&, Stream);
template void pixel_sumsq_typed<float>(const PixelSumsqParams&, Stream);
template void pixel_sumsq_typed<BFloat16>(const PixelSumsqParams&, Stream);
template void pixel_sumsq_typed<Half>(const PixelSumsqParams&, Stream);

template void window_norm_typed<double>(const WindowNormParams&, Stream);
template void window_norm_typed<float>(const WindowNormParams&, Stream);

template void filter_norm_typed<double>(const FilterNormParams&, Stream);
template void filter_norm_typed<float>(const FilterNormParams&, Stream);
template void filter_norm_typed<BFloat16>(const FilterNormParams&, Stream);
template void filter_norm_typed<Half>(const FilterNormParams&, Stream);

template void column_sums_typed<double>(const ColumnSumsParams&, Stream);
template void column_sums_typed<float>(const ColumnSumsParams&, Stream);

template void filter_grad_typed<double>(const FilterGradParams&, Stream);
template void filter_grad_typed<float>(const FilterGradParams&, Stream);
template void filter_grad_typed<BFloat16>(const FilterGradParams&, Stream);
template void filter_grad_typed<Half>(const FilterGradParams&, Stream);

template void grad_input_typed<double>(const GradInputParams&, Stream);
template void grad_input_typed<float>(const GradInputParams&, Stream);
template void grad_input_typed<BFloat16>(const GradInputParams&, Stream);
template void grad_input_typed<Half>(const GradInputParams&, Stream);

// The host asks for the number of blocks before it launches them.
int64_t window_norm_blocks(const WindowNormParams& p) {
  return window_norm_grid(p);
}

}  // namespace dcconv::cuda
