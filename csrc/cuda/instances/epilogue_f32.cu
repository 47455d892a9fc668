#include "cuda/passes/epilogue.cuh"

template void
dcconv::cuda::epilogue_typed<float>(const dcconv::cuda::EpilogueParams&, dcconv::cuda::Stream);
