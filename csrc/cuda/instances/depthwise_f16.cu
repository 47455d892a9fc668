#include "cuda/fused/depthwise/forward.cuh"
#include "cuda/fused/depthwise/grad_dot.cuh"
#include "cuda/fused/depthwise/grad_input.cuh"
#include "cuda/fused/depthwise/grad_weight.cuh"

namespace dcconv::cuda {

template bool grad_dot_elementwise_typed<Half>(const GradDotParams&, Stream);
template void depthwise_typed<Half>(const FusedParams&, Stream);
template void depthwise_grad_input_typed<Half>(const FusedGradInputParams&, Stream);
template void depthwise_grad_weight_typed<Half>(const DepthwiseGradWeightParams&, Stream);

}  // namespace dcconv::cuda
