"""The error of every gradient with y kept for backward against u kept.

The table in ``dcconv/call/saved.py`` comes from here: [4, 32, 14, 14] -> 32, 3x3, tanh, the mean
norm of the batch, random normal operands, error against the float64 reference by the accuracy rule.
Where ``keep="output"`` is refused for accuracy, the refusal is switched off to measure what it
prevents.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy import error
from dcconv import functional
from dcconv.call import saved
from dcconv.operator import arguments, reference
from dcconv.operator.functions import angulars
from dcconv.operator.numerics import ANGLE_DELTA, FLOATING_DTYPES
from dcconv.operator.records import CURVATURE, RADIUS, Geometry, Operator, Problem


def gradients(dtype: torch.dtype, angular: str, kept: str | None) -> dict[str, Tensor]:
    """Return the gradients of x and weight; ``kept`` None asks for the float64 reference."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return (values if kept is not None else values.double()).requires_grad_()

    x, weight, cotangent = normal(4, 32, 14, 14), normal(32, 32, 3, 3), normal(4, 32, 14, 14)
    if kept is not None:
        y = functional.decoupled_conv2d(
            x, weight, padding=1, angular=angular, norm_mean="batch", keep=kept, backend="cpu"
        )
    else:
        operands, problem = arguments.convolution(
            x,
            weight,
            None,
            RADIUS,
            "batch",
            CURVATURE,
            Operator(angular=angular),
            Geometry(padding=1),
        )
        y, _ = reference.forward(operands, problem._replace(delta=ANGLE_DELTA[dtype]))
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), cotangent.detach())
    return {"grad_x": grad_x, "grad_weight": grad_weight}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take none: the problem is fixed, since its figures stand in ``dcconv/call/saved.py``."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the table."""
    table = Table("angular", "dtype", "auto keeps", "grad_x, y / u", "grad_weight, y / u")
    for angular, record in angulars.items():
        for dtype in FLOATING_DTYPES[::-1]:
            truth = gradients(dtype, angular, None)
            cells = []
            with mock.patch.object(saved, "why_not_output", return_value=None):
                dot = gradients(dtype, angular, "dot")
                output = gradients(dtype, angular, "output") if record.invertible else None
            for name, exact in truth.items():
                by_output = f"{error(output[name], exact):.1e}" if output else "no inverse"
                cells.append(f"{by_output} / {error(dot[name], exact):.1e}")
            problem = Problem(Operator(angular=angular))
            auto = saved.kept(problem, dtype, bias=False, keep="auto")
            table.add_row(angular, str(dtype).removeprefix("torch."), auto, *cells)
    console.print(table)
    return 0
