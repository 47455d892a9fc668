"""The operator by plan B of the triton backend, with a tile of the tester's choice."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dcconv import autograd, functional, plan_b_triton
from dcconv.dispatch import Plans
from dcconv.keep import kept
from dcconv.plan_b import OWN_RULE


def planned(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    keep: str = "auto",
    tile: int = OWN_RULE,
    **options: Any,
) -> Tensor:
    """Run the operator by plan B with a tile, in every direction that plan B goes."""
    operands, problem, _ = functional.check_call(x, weight, bias, keep=keep, **options)
    takes_x = plan_b_triton.why_not_input_gradient(operands, problem) is None
    takes_weight = plan_b_triton.why_not_weight_gradient(operands, problem) is None
    plans = Plans(
        partial(plan_b_triton.forward, tile=tile),
        plan_b_triton.NAMESPACE,
        partial(plan_b_triton.input_gradient, tile=tile) if takes_x else None,
        plan_b_triton.weight_gradient if takes_weight else None,
    )
    mode = kept(problem, x.dtype, bias is not None, keep)
    return autograd.DecoupledConv2dFunction.apply(*operands, problem, mode, plans)[0]
