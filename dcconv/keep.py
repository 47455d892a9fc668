"""What backward keeps besides x, weight and the norm map: the output y, the dot product u, nothing.

From y, with h > 0 by construction, backward recovers c = g^-1(y / h); from u, c = u / (a b).
Norm-free operators (linear x cosine) need neither. The compiled backends follow this table; the
reference keeps whatever autograd keeps.

Errors of grad_x against float64 (the accuracy rule's error), y kept / u kept, measured by
``python -m bench.keep`` on [4, 32, 14, 14] -> 32, 3x3, tanh:

| angular         | auto   | float64           | float32           | bfloat16          | float16           |
|-----------------|--------|-------------------|-------------------|-------------------|-------------------|
| linear          | y      | 5.8e-16 / 5.8e-16 | 4.0e-07 / 4.0e-07 | 4.3e-03 / 4.3e-03 | 2.6e-04 / 2.5e-04 |
| cosine          | y      | 4.4e-16 / 4.4e-16 | 3.8e-07 / 3.8e-07 | 4.9e-03 / 4.9e-03 | 3.2e-04 / 3.2e-04 |
| square_cosine   | y (1)  | 6.0e-16 / 7.5e-16 | 4.4e-07 / 4.2e-07 | 4.6e-03 / 5.1e-03 | 3.7e-04 / 4.3e-04 |
| sigmoid         | u      | none / 5.3e-16    | none / 4.3e-07    | none / 5.3e-03    | none / 3.9e-04    |
| power           | u      | none / 7.5e-16    | none / 4.2e-07    | none / 5.1e-03    | none / 4.3e-04    |
| any with a bias | u      | y / h is not g    |                   |                   |                   |

(1) u in float16: at this size y is exact enough, but y falls with c^2 and is subnormal below 6e-5.
"""

from __future__ import annotations

import torch

from dcconv.checks import value_error
from dcconv.functions import angulars
from dcconv.problem import Problem

OUTPUT, DOT, NOTHING = "output", "dot", "nothing"


def why_not_output(problem: Problem, dtype: torch.dtype, bias: bool) -> str | None:
    """Return why y is not exact enough to be the kept tensor, or None if it is."""
    if bias:
        return "a bias is added after the operator, so y / h is not g"
    if not angulars[problem.angular].invertible:
        return f"angular '{problem.angular}' is not recovered from y at full accuracy"
    if dtype == torch.float16 and problem.angular == "square_cosine":
        return "the small values of 'square_cosine' are subnormal in float16"
    return None


def kept(problem: Problem, dtype: torch.dtype, bias: bool, keep: str) -> str:
    """Return what backward keeps for a call: ``output``, ``dot`` or ``nothing``.

    Args:
        problem: the call.
        dtype: storage dtype of x.
        bias: whether a bias is added.
        keep: the user's choice, ``auto``, ``output`` or ``dot``.

    Raises:
        ValueError: ``output`` was asked for where it is not exact enough.
    """
    if problem.norm_free:
        return NOTHING
    reason = why_not_output(problem, dtype, bias)
    if keep == "output" and reason is not None:
        raise value_error("keep", f"be 'auto' or 'dot' here ({reason})", "'output'")
    if keep == "dot" or reason is not None:
        return DOT
    return OUTPUT
