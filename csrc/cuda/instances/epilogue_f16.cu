#include "cuda/passes/epilogue.cuh"

template void dcconv::cuda::epilogue_typed<dcconv::Half>(
    const dcconv::cuda::EpilogueParams&, dcconv::cuda::Stream
);
