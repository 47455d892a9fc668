"""What backward keeps besides x, weight and the norm map: the output y, the dot product u, or none.

From y, with h > 0 by construction, backward recovers c = g^-1(y / h); from u, c = u / (a b).
Norm-free operators (linear x cosine) need neither. The compiled backends follow this table; the
reference keeps whatever autograd keeps.

Errors of grad_x against float64 (the accuracy rule's error), y kept / u kept, measured by
``python -m bench keep`` on [4, 32, 14, 14] -> 32, 3x3, tanh:

| angular         | auto  | float64         | float32         | bfloat16        | float16         |
|-----------------|-------|-----------------|-----------------|-----------------|-----------------|
| linear          | y     | 6e-16 / 6e-16   | 4.0e-7 / 4.0e-7 | 4.3e-3 / 4.3e-3 | 2.6e-4 / 2.5e-4 |
| cosine          | y     | 4e-16 / 4e-16   | 3.8e-7 / 3.8e-7 | 4.9e-3 / 4.9e-3 | 3.2e-4 / 3.2e-4 |
| square_cosine   | y (1) | 6e-16 / 8e-16   | 4.4e-7 / 4.2e-7 | 4.6e-3 / 5.1e-3 | 3.7e-4 / 4.3e-4 |
| sigmoid         | u     | none / 5e-16    | none / 4.3e-7   | none / 5.3e-3   | none / 3.9e-4   |
| power           | u     | none / 8e-16    | none / 4.2e-7   | none / 5.1e-3   | none / 4.3e-4   |
| any with a bias | u     | y / h is not g  |                 |                 |                 |

(1) u in float16: at this size y is exact enough, but y falls with c^2 and is subnormal below 6e-5.
"""

from __future__ import annotations

import torch

from dcconv.operator.checks import value_error
from dcconv.operator.functions import angulars
from dcconv.operator.records import Problem
from dcconv.passes import records

OUTPUT, DOT, NOTHING = records.OUTPUT, records.DOT, records.NOTHING


def why_not_output(problem: Problem, dtype: torch.dtype, bias: bool) -> str | None:
    """Return why y is not exact enough to be the kept tensor, or None if it is."""
    if bias:
        return "a bias is added after the operator, so y / h is not g"
    if not angulars[problem.operator.angular].invertible:
        return f"angular '{problem.operator.angular}' is not recovered from y at full accuracy"
    if dtype == torch.float16 and problem.operator.angular == "square_cosine":
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
    if problem.operator.norm_free:
        return NOTHING
    reason = why_not_output(problem, dtype, bias)
    if keep == "output" and reason is not None:
        raise value_error("keep", f"be 'auto' or 'dot' here ({reason})", "'output'")
    if keep == "dot" or reason is not None:
        return DOT
    return OUTPUT
