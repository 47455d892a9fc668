#include "cuda/fused/stem/stem.cuh"
#include "cuda/support/typed.h"

namespace dcconv::cuda {

template void stem_typed<double>(const OnePassParams&, Stream);
template void stem_typed<float>(const OnePassParams&, Stream);
template void stem_typed<BFloat16>(const OnePassParams&, Stream);
template void stem_typed<Half>(const OnePassParams&, Stream);

}  // namespace dcconv::cuda
