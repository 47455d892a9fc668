"""Forward around the library convolution: norms, convolution, epilogue; and the patch norm.

The passes work on tensors that are dense in the layout of the library's result
(``memory_format``). Every function takes the namespace of the ops: several libraries implement
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import ops, products, records
from dcconv.passes.products import size_of
from dcconv.passes.records import COMPILED


def scales_filters(problem: Problem) -> bool:
    """Return whether a norm-free operator differs from a plain convolution."""
    return problem.operator.weighting == "none" or problem.operator.alpha != 1.0


def scaled_filters(weight: Tensor, problem: Problem, namespace: str) -> tuple[Tensor, Tensor]:
    """Return the filters of a norm-free operator, and their norms."""
    operator = problem.operator
    divide = operator.weighting == "none"
    return ops.filter_scale(
        records.FilterScale(weight, operator.alpha, operator.eps, divide), namespace
    )


def forward(
    operands: Operands,
    problem: Problem,
    kept: str,
    sums: Tensor | None = None,
    namespace: str = COMPILED,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator.

    Args:
        operands, problem, kept: the call.
        sums: of the squares of x per pixel and group, a map; None where they are not known.
        namespace: of the passes.

    Returns:
        y, the norm map, the mean norm, u and the filter norms a, [o]. What is not there is [0]:
        the mean but with ``norm="batch"``, u but with ``kept="dot"``, and for norm-free operators
        all but y and, where filters are divided by it, a.
    """
    x, weight, bias, radius, norm_mean, k = operands
    layout = memory_format(x, weight)
    last = layout == torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=memory_format(weight))
    if problem.operator.norm_free:
        compute = compute_dtype(x.dtype)
        a = x.new_empty(0, dtype=compute)
        if scales_filters(problem):
            weight, a = scaled_filters(weight, problem, namespace)
        y = products.forward(x, weight, bias, problem, layout)
        norm_map, mean = x.new_empty(0, dtype=compute), x.new_empty(0, dtype=compute)
        return y, norm_map, mean, x.new_empty(0), a

    batch_mean, eps = problem.norm == NORM_BATCH, problem.operator.eps
    norms_of = records.Norms(x, weight, problem.window, eps, batch_mean, last, sums)
    a, norms, mean = ops.conv2d_norms(norms_of, namespace)
    u = products.forward(x, weight, None, problem, layout)
    parameters = records.Parameters(radius, mean if batch_mean else norm_mean, k)
    windows = (size_of(x), size_of(weight), problem.window)
    formula = (records.functions(problem), problem.delta, eps)
    call = records.Epilogue(u, a, norms, bias, parameters, *windows, *formula, True, last)
    if kept == records.DOT:
        y, _ = ops.conv2d_epilogue(call, namespace)
        return y, norms, mean, u, a
    ops.conv2d_epilogue_(call, namespace)
    return u, norms, mean, x.new_empty(0), a


def window_norm(
    x: Tensor, kernel: tuple[int, int], problem: Problem, namespace: str = COMPILED
) -> Tensor:
    """Return the patch norm, [n, groups, p, q]."""
    x = x.contiguous(memory_format=memory_format(x))
    call = records.WindowNorm(x, kernel, problem.window, problem.operator.eps)
    return ops.window_norm(call, namespace)
