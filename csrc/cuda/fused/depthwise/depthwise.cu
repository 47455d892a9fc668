// The depthwise kernels by dtype.

#include "cuda/support/typed.h"

namespace dcconv::cuda {

void depthwise(Dtype dtype, const FusedParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { depthwise_typed<decltype(t)>(p, stream); });
}

void depthwise_grad_input(Dtype dtype, const FusedGradInputParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { depthwise_grad_input_typed<decltype(t)>(p, stream); });
}

void depthwise_grad_weight(Dtype dtype, const DepthwiseGradWeightParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { depthwise_grad_weight_typed<decltype(t)>(p, stream); });
}

}  // namespace dcconv::cuda
