// The stem kernel by dtype.

#include <stdexcept>

#include "cuda/kernels.h"

namespace dcconv {
namespace cuda {

void stem(Dtype, const OnePassParams&, Stream) {
  throw std::runtime_error("dcconv: kernel stem is not there");
}

}  // namespace cuda
}  // namespace dcconv
