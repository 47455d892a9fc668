"""Strategies of the cpu backend: its ops choose library or fused, and a setting forces one.

The rule and the kernels' limits stand in ``csrc/cpu``; this side asks and forces. Compiled code and
tensors of other classes than PyTorch's own leave the choice to the ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dcconv import native
from dcconv.call import autograd
from dcconv.call.key import FORWARD
from dcconv.call.rule import FUSED
from dcconv.operator.records import Operands, Problem

#: In the place of a strategy: the op chooses.
AUTO = "auto"


@contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Have the ops that this thread calls take a strategy wherever they can."""
    # A mode that watches or records ops is not meant to see these.
    with torch._C._DisableTorchDispatch():
        torch.ops.dcconv.set_cpu_strategy(strategy)
    try:
        yield
    finally:
        with torch._C._DisableTorchDispatch():
            torch.ops.dcconv.set_cpu_strategy(AUTO)


def taken(operands: Operands, problem: Problem, direction: str) -> str:
    """Return the strategy that the op of a direction would take now; both gradients are one op."""
    x, weight, *_ = operands
    geometry_and_functions = native.conv2d_arguments(operands, problem)[6:14]
    with torch._C._DisableTorchDispatch():
        forward, backward = torch.ops.dcconv.cpu_strategies(x, weight, *geometry_and_functions)
    return str(forward if direction == FORWARD else backward)


def why_not_fused(operands: Operands, problem: Problem, direction: str) -> str | None:
    """Return None if the fused kernels compute a direction of a call, else one sentence."""
    if problem.operator.norm_free:
        return "norm-free operators are one library convolution"
    with forced(FUSED):
        if taken(operands, problem, direction) == FUSED:
            return None
    limits = "" if direction == FORWARD else ", padded with zeros and at stride 1"
    return (
        "its fused kernels take depthwise layers, and float32 layers without groups that are "
        f"channels_last or 1x1{limits}"
    )


def forward(strategy: str) -> autograd.Forward:
    """Return the forward op under a strategy."""

    def run(
        operands: Operands, problem: Problem, kept: str, sums: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        with forced(strategy):
            return autograd.one_op_forward(operands, problem, kept, sums)

    return run


def backward(strategy: str) -> autograd.Backward:
    """Return the backward op, which makes all gradients, under a strategy."""

    def run(
        grad_y: Tensor,
        kept_tensor: Tensor,
        norm_map: Tensor,
        mean: Tensor,
        operands: Operands,
        problem: Problem,
        kept: str,
        needs: int,
    ) -> Sequence[Tensor | None]:
        with forced(strategy):
            return autograd.one_op_backward(
                grad_y, kept_tensor, norm_map, mean, operands, problem, kept, needs
            )

    return run
