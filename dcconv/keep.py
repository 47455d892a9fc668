"""What backward keeps besides x, weight and the norm map: the output y, the dot product u, nothing.

From y, with h > 0 by construction, backward recovers c = g^-1(y / h); from u, c = u / (a b). The
compiled backend recovers; the reference keeps whatever autograd keeps.

| angular       | dtype             | auto keeps | error of grad_x, y kept / u kept |
|---------------|-------------------|------------|----------------------------------|
| cosine        | float32           | y          | see ``bench/keep.py``            |
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
