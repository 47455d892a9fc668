// How kernels run: the table of the chosen instruction set, and tasks over PyTorch's threads.
#pragma once

#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "tensor.h"

namespace dcconv::cpu {

// Threads take at least `grain` tasks each; fewer tasks than that run on the caller.
template <class Kernel>
void run_tasks(int64_t tasks, const Kernel& kernel, int64_t grain = 1) {
  const auto run = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Kernel*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&kernel));
  if (torch_parallel_for(0, tasks, grain, run, context) != TORCH_SUCCESS)
    library_failed("parallel_for");
}

// The kernels of the chosen instruction set. float_library: see kernels.h.
const Kernels& kernels(Dtype dtype, bool float_library = false);

}  // namespace dcconv::cpu
