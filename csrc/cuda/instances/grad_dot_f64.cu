#include "cuda/passes/grad_dot.cuh"

template void
dcconv::cuda::grad_dot_typed<double>(const dcconv::cuda::GradDotParams&, dcconv::cuda::Stream);
