#include "cuda/fused/implicit_gemm/forward.cuh"
#include "cuda/fused/implicit_gemm/gradient.cuh"

template void dcconv::cuda::implicit_gemm_typed<dcconv::Half>(
    const dcconv::cuda::FusedParams&, int, dcconv::cuda::Stream
);
template void dcconv::cuda::implicit_gemm_grad_input_typed<dcconv::Half>(
    const dcconv::cuda::FusedGradInputParams&, int, dcconv::cuda::Stream
);
