// The implicit GEMM by dtype.

#include <stdexcept>

#include "cuda/kernels.h"

namespace dcconv {
namespace cuda {

void implicit_gemm(Dtype, const OnePassParams&, Stream) {
  throw std::runtime_error("dcconv: kernel implicit_gemm is not there");
}

void implicit_gemm_grad_input(Dtype, const OnePassGradInputParams&, Stream) {
  throw std::runtime_error("dcconv: kernel implicit_gemm_grad_input is not there");
}

}  // namespace cuda
}  // namespace dcconv
