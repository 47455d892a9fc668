#include "cuda/fused/implicit_gemm/forward.cuh"
#include "cuda/fused/implicit_gemm/gradient.cuh"

template void dcconv::cuda::implicit_gemm_typed<dcconv::BFloat16>(
    const dcconv::cuda::FusedParams&, int, dcconv::cuda::Stream
);
template void dcconv::cuda::implicit_gemm_grad_input_typed<dcconv::BFloat16>(
    const dcconv::cuda::FusedGradInputParams&, int, dcconv::cuda::Stream
);
