// SPDX-License-Identifier: MIT
// Reports which of the compiled device codes a GPU runs. No kernel of the operator is in here.

#include <cuda_runtime.h>

#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace dcconv {
namespace {

// One thread writes the target it was compiled for: 900 for sm_90 and sm_90a machine code, 1200
// for compute_120 PTX translated by the driver, and so on.
// out: [1]
__global__ void cuda_arch_kernel(int32_t* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

// out: [1] int32
void cuda_arch(torch::stable::Tensor out) {
  DCCONV_CHECK(
      out.scalar_type() == torch::headeronly::ScalarType::Int && out.numel() == 1,
      "out must be one int32 element, got ",
      out.numel(),
      " of dtype ",
      torch::headeronly::toString(out.scalar_type())
  );
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream) != TORCH_SUCCESS)
    fail("the question for the current stream failed");
  cuda_arch_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<int32_t*>(out.mutable_data_ptr())
  );
  const cudaError_t error = cudaGetLastError();
  DCCONV_CHECK(error == cudaSuccess, "kernel cuda_arch did not start: ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace dcconv

// The schema is here and not in ops.cpp: the op exists only in builds with CUDA code.
STABLE_TORCH_LIBRARY_FRAGMENT(dcconv, m) {
  m.def("cuda_arch(Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcconv, CUDA, m) {
  m.impl("cuda_arch", TORCH_BOX(&dcconv::cuda_arch));
}
