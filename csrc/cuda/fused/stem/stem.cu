// The stem kernel by dtype.

#include "cuda/support/typed.h"

namespace dcconv::cuda {

void stem(Dtype dtype, const FusedParams& p, Stream stream) {
  with_storage(dtype, [&](auto t) { stem_typed<decltype(t)>(p, stream); });
}

}  // namespace dcconv::cuda
