"""What test_triton.py asks its worker processes to check: one interprets kernels, one compiles."""
