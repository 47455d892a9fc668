"""The passes of plan A in Triton: the same ops as in ``csrc/schemas.h``, as ``dcconv_triton``."""
