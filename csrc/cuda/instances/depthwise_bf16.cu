#include "cuda/fused/depthwise/forward.cuh"
#include "cuda/fused/depthwise/grad_dot.cuh"
#include "cuda/fused/depthwise/grad_input.cuh"
#include "cuda/fused/depthwise/grad_weight.cuh"

namespace dcconv::cuda {

template bool grad_dot_elementwise_typed<BFloat16>(const GradDotParams&, Stream);
template void depthwise_typed<BFloat16>(const FusedParams&, Stream);
template void depthwise_grad_input_typed<BFloat16>(const FusedGradInputParams&, Stream);
template void depthwise_grad_weight_typed<BFloat16>(const DepthwiseGradWeightParams&, Stream);

}  // namespace dcconv::cuda
