#include "cuda/fused/stem/stem.cuh"
#include "cuda/support/typed.h"

namespace dcconv::cuda {

template void stem_typed<double>(const FusedParams&, Stream);
template void stem_typed<float>(const FusedParams&, Stream);
template void stem_typed<BFloat16>(const FusedParams&, Stream);
template void stem_typed<Half>(const FusedParams&, Stream);

}  // namespace dcconv::cuda
