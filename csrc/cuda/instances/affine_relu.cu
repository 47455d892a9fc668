#include "cuda/passes/affine_relu.cuh"
#include "cuda/support/typed.h"

namespace dcconv::cuda {

template void affine_relu_typed<double>(const AffineReluParams&, Stream);
template void affine_relu_typed<float>(const AffineReluParams&, Stream);
template void affine_relu_typed<BFloat16>(const AffineReluParams&, Stream);
template void affine_relu_typed<Half>(const AffineReluParams&, Stream);

}  // namespace dcconv::cuda
