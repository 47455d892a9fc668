#include "cuda/passes/epilogue.cuh"

template void
dcconv::cuda::epilogue_typed<double>(const dcconv::cuda::EpilogueParams&, dcconv::cuda::Stream);
