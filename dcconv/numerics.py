"""The constants of the operator's arithmetic: dtypes, caps and floors, each named once."""

from __future__ import annotations

import torch

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Added to the sum of squares inside both square roots, the official code's value.
EPS = 1e-4

# rho = radius * norm_mean never falls below this, so that b / rho stays defined.
RHO_FLOOR = 1e-12

# Floor of (1 - c)(1 + c) in the derivative of asin. Half precision (and TF32) dot products pass
# |c| = 1 by up to 7e-4, float32 ones by 1e-7 (measured on aligned vectors).
ANGLE_DELTA = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}

# The accuracy rule, for y and every gradient: err(kernel) <= factor * min(err(peer), cap * floor)
# + floor, both errors against float64. Tests and benchmarks take the numbers from here.
ACCURACY_FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
PEER_FACTOR = 2.0
PEER_CAP = 8.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, sums, c, h and g for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
