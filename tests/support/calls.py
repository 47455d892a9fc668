"""Checked calls for tests that go below the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcconv import backends
from dcconv.call.runner import Runner
from dcconv.operator import arguments
from dcconv.operator.records import (
    CURVATURE,
    RADIUS,
    Geometry,
    Operands,
    Operator,
    Problem,
    Window,
)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    radius: Tensor | float = RADIUS,
    norm_mean: Tensor | str | None = None,
    k: Tensor | float = CURVATURE,
    padding_mode: str = "zeros",
    norm_grad: bool = True,
    **operator: Any,
) -> tuple[Operands, Problem]:
    """Return operands and problem of a call of ``dcconv.decoupled_conv2d``."""
    geometry = Geometry(stride, padding, dilation, groups, padding_mode)
    return arguments.convolution(
        x, weight, bias, radius, norm_mean, k, Operator(**operator), geometry, norm_grad
    )


def check_call(
    *tensors: Any, keep: str = "auto", backend: str | None = None, **options: Any
) -> tuple[Operands, Problem, Runner]:
    """Return operands, problem and backend of a call of ``dcconv.decoupled_conv2d``."""
    operands, problem = convolution(*tensors, **options)
    return operands, problem, backends.choose(operands.x, backend, problem.operator)


def problem_with(**fields: Any) -> Problem:
    """Return the default problem with other fields, of the problem and of its records."""
    operator = {n: fields.pop(n) for n in list(fields) if n in Operator.__dataclass_fields__}
    window = {n: fields.pop(n) for n in list(fields) if n in Window._fields}
    return Problem(Operator(**operator), Window(**window), **fields)
