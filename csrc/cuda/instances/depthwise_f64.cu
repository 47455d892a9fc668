#include "cuda/fused/depthwise/forward.cuh"
#include "cuda/fused/depthwise/grad_dot.cuh"
#include "cuda/fused/depthwise/grad_input.cuh"
#include "cuda/fused/depthwise/grad_weight.cuh"

namespace dcconv::cuda {

template bool grad_dot_elementwise_typed<double>(const GradDotParams&, Stream);
template void depthwise_typed<double>(const FusedParams&, Stream);
template void depthwise_grad_input_typed<double>(const FusedGradInputParams&, Stream);
template void depthwise_grad_weight_typed<double>(const DepthwiseGradWeightParams&, Stream);

}  // namespace dcconv::cuda
