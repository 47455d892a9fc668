// The depthwise kernels of one instruction set; included once by each depthwise_*.cpp through the
// file that switches the target on. Apart from the others, so that two cores compile a set's code.

#include "cpu/depthwise/backward.h"
#include "cpu/depthwise/forward.h"

namespace dcconv::cpu::DCCONV_ISA {

// For every dtype in the table (table.inl).
#define DCCONV_DEPTHWISE(T, A)                                                                     \
  template void depthwise_forward<T, A>(const DepthwiseParams&, int64_t, int64_t);                 \
  template void depthwise_backward<T, A>(const DepthwiseGradParams&, int64_t, int64_t)

DCCONV_DEPTHWISE(double, double);
DCCONV_DEPTHWISE(float, float);
DCCONV_DEPTHWISE(BFloat16, float);
DCCONV_DEPTHWISE(Half, float);

}  // namespace dcconv::cpu::DCCONV_ISA
