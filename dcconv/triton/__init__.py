"""The ops of ``csrc/schemas.h`` in Triton, as ``dcconv_triton``."""
