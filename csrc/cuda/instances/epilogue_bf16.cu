#include "cuda/passes/epilogue.cuh"

template void dcconv::cuda::epilogue_typed<dcconv::BFloat16>(
    const dcconv::cuda::EpilogueParams&, dcconv::cuda::Stream
);
