"""The constants of the operator's arithmetic: dtypes, caps and floors, each named once."""

from __future__ import annotations

import math
from typing import Any

import torch

from dcconv.tracing import constant_for_tracing

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

# float32 products on the tensor cores keep ten bits of their factors.
TF32_ANGLE_DELTA = 1e-3

PI = math.pi

# Most rows and columns of windows, strides, dilations and paddings, and most elements of a tensor
# that a call makes: sums and products of a few of them fit 64 bits (csrc/check.h has the same).
MOST_PIXELS = 2**31 - 1
MOST_ELEMENTS = 2**50

# The official parametrisation r = v^2 + 1e-4 and k = |v| + 0.05.
RADIUS_OFFSET = 1e-4
K_OFFSET = 0.05

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

# Where rounding alone moves a result by more than the rule allows, a kernel may be off by as many
# such moves as it has roundings where a move has one: docs/accuracy.md.
NOISE_FACTOR = 4.0


# Numbers of a module are inputs of a graph with dynamic sizes, and an input that is first used
# inside an autograd function cannot be used by a second one (PyTorch 2.13 and 2.14): functions that
# are traced take theirs from here, as constants.
@constant_for_tracing
def constant(name: str) -> float:
    """Return a number of this module by its name, also while tracing."""
    value: float = globals()[name]
    return value


@constant_for_tracing
def _angle_delta_of(dtype: torch.dtype, tf32: bool) -> float:
    return TF32_ANGLE_DELTA if tf32 else ANGLE_DELTA[dtype]


# Constant for tracing: a compiled graph keeps the setting it was compiled under.
@constant_for_tracing
def tf32_convolutions() -> bool:
    """Return whether PyTorch may round operands of float32 convolutions on GPUs to TF32."""
    # MIOpen's convolutions have no such precision, whatever the switch says.
    if torch.version.hip is not None:
        return False
    # This property follows the older switch, cudnn.allow_tf32, as well; reading that one after the
    # newer properties were set may raise.
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


def angle_delta(x: torch.Tensor) -> float:
    """Return the floor of (1 - c)(1 + c) for the precision of x's dot products."""
    tf32 = x.dtype == torch.float32 and x.device.type == "cuda" and tf32_convolutions()
    delta: float = _angle_delta_of(x.dtype, tf32)
    return delta


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, sums, c, h and g for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
