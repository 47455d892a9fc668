"""The operator by the strategy fused of the triton backend, with a tile of the tester's choice."""

from __future__ import annotations

from functools import partial
from typing import Any

from calls import check_call
from torch import Tensor

from dcconv.call import autograd
from dcconv.call.autograd import Chosen
from dcconv.call.saved import kept
from dcconv.passes.records import INPUT_GRADIENT, OWN_RULE, WEIGHT_GRADIENT
from dcconv.triton import fused as triton_fused


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    keep: str = "auto",
    tile: int = OWN_RULE,
    **options: Any,
) -> Tensor:
    """Run the operator in one pass with a tile, in every direction that has one."""
    operands, problem, _ = check_call(x, weight, bias, keep=keep, **options)
    takes_x = triton_fused.why_not(operands, problem, INPUT_GRADIENT) is None
    takes_weight = triton_fused.why_not(operands, problem, WEIGHT_GRADIENT) is None
    chosen = Chosen(
        partial(triton_fused.forward, tile=tile),
        triton_fused.NAMESPACE,
        partial(triton_fused.input_gradient, tile=tile) if takes_x else None,
        triton_fused.weight_gradient if takes_weight else None,
    )
    mode = kept(problem, x.dtype, bias is not None, keep)
    return autograd.DecoupledConv2dFunction.apply(*operands, problem, mode, chosen, None)[0]
