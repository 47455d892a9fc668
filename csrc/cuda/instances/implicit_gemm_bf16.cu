#include "cuda/fused/implicit_gemm/forward.cuh"
#include "cuda/fused/implicit_gemm/gradient.cuh"

template void dcconv::cuda::implicit_gemm_typed<dcconv::BFloat16>(
    const dcconv::cuda::OnePassParams&, int, dcconv::cuda::Stream
);
template void dcconv::cuda::implicit_gemm_grad_input_typed<dcconv::BFloat16>(
    const dcconv::cuda::OnePassGradInputParams&, int, dcconv::cuda::Stream
);
