// The depthwise kernels by dtype.

#include <stdexcept>

#include "cuda/kernels.h"

namespace dcconv {
namespace cuda {

void depthwise(Dtype, const OnePassParams&, Stream) {
  throw std::runtime_error("dcconv: kernel depthwise is not there");
}

void depthwise_grad_input(Dtype, const OnePassGradInputParams&, Stream) {
  throw std::runtime_error("dcconv: kernel depthwise_grad_input is not there");
}

void depthwise_grad_weight(Dtype, const DepthwiseGradWeightParams&, Stream) {
  throw std::runtime_error("dcconv: kernel depthwise_grad_weight is not there");
}

}  // namespace cuda
}  // namespace dcconv
