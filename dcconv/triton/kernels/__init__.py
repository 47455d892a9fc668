"""The Triton kernels and the functions inside them; importing one needs Triton."""
