"""The definition of decoupled convolution in plain PyTorch: what every kernel is judged by.

For every output position p and filter o, with u = <w_o, x_p>, a_o = sqrt(||w_o||^2 + eps),
b_p = sqrt(||x_p||^2 + eps) and c = u / (a_o b_p):

    y[p, o] = h(a_o, b_p; alpha, beta, rho_o) * g(c; k, power) + bias_o

Zero cases: an all-zero patch has u = 0 and b = sqrt(eps), so y = bias and every gradient is
finite; an all-zero filter likewise with a = sqrt(eps). Subgradients at the kinks follow the
official code: ball counts b == rho as inside, segmented as outside; the derivative of asin is
capped (``functions.capped_asin``). rho on its floor follows the radius, below it does not. Every
kink is a selection (``torch.where``): clamp, minimum and their kin have slopes at a tie that are
PyTorch's choice and change with its version.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcconv.operator import arguments, convolution, records
from dcconv.operator.functions import angulars, weighted_magnitude
from dcconv.operator.numerics import compute_dtype, constant
from dcconv.operator.records import Geometry, Operands, Operator, Problem
from dcconv.tracing import recording


def padded(x: Tensor, problem: Problem) -> tuple[Tensor, tuple[int, int]]:
    """Return x and the padding left to the library: x itself where it can pad alone."""
    top, bottom, left, right = problem.window.padding
    if problem.window.symmetric_zeros:
        return x, (top, left)
    mode = "constant" if problem.window.padding_mode == "zeros" else problem.window.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


def window_norm(x: Tensor, kernel: tuple[int, int], problem: Problem) -> Tensor:
    """Return b = sqrt(sum of x^2 over each patch + eps), [n, groups, p, q] in compute dtype."""
    squares = x.to(compute_dtype(x.dtype)).square()
    per_pixel = squares.unflatten(1, (problem.window.groups, -1)).sum(dim=2)
    per_pixel, padding = padded(per_pixel, problem)
    stride, _, dilation, groups, _ = problem.window
    ones = per_pixel.new_ones(groups, 1, *kernel)
    sums = convolution.conv2d(per_pixel, ones, None, stride, padding, dilation, groups)
    # A library may form the sums by an algorithm whose rounding dips below zero. They count as zero
    # and keep the slope of a sum: a zero patch has second derivatives, 1 / sqrt(eps). clamp would
    # not do: which slope it has at its bound differs between versions of PyTorch.
    sums = torch.where(sums < 0.0, sums - sums.detach(), sums)
    return torch.sqrt(sums + problem.operator.eps)


def pixel_sums(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    """Return the sums of x^2 per pixel and group in compute dtype, 1-d, as passes have maps."""
    squares = x.to(compute_dtype(x.dtype)).square()
    per_pixel = squares.unflatten(1, (groups, -1)).sum(dim=2)
    in_order: Tensor = per_pixel.permute(0, 2, 3, 1) if channels_last else per_pixel
    return in_order.flatten()


def filter_norm(weight: Tensor, eps: float) -> Tensor:
    """Return a = sqrt(sum of w^2 over each filter + eps), [o] in compute dtype."""
    return torch.sqrt(weight.to(compute_dtype(weight.dtype)).square().sum(dim=(1, 2, 3)) + eps)


def mean_norm(b: Tensor) -> Tensor:
    """Return the mean of the norm map, a scalar; 0 for an empty batch."""
    if recording():  # their number stays open
        return b.mean()
    return b.sum() / max(b.numel(), 1)


def per_filter(value: Tensor, filters: int, groups: int) -> Tensor:
    """Shape a [] or [o] parameter to broadcast against u, whose filters are split by group."""
    value = value.expand(filters)
    if groups > 1:
        value = value.unflatten(0, (groups, filters // groups))
    return value.unsqueeze(-1).unsqueeze(-1)


def forward(operands: Operands, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Evaluate the operator on checked operands.

    Returns:
        y, [n, o, p, q] in x's dtype, and the batch's mean norm, a scalar, or None where the
        problem does not use it.
    """
    x, weight, bias, radius, norm_mean, k = operands
    operator = problem.operator
    filters, groups = weight.shape[0], problem.window.groups
    compute = compute_dtype(x.dtype)

    # Ahead of the convolution: the layout of a gradient is that of its part which is formed first,
    # so of the last operation here.
    b_map = b = window_norm(x, (weight.shape[2], weight.shape[3]), problem)
    library_x, padding = padded(x, problem)
    dot = convolution.conv2d(
        library_x, weight, None, problem.window.stride, padding, problem.window.dilation, groups
    )
    u = dot.to(compute)
    if groups > 1:
        u = u.unflatten(1, (groups, filters // groups))
        b = b_map.unsqueeze(2)  # [n, g, 1, p, q]
    a = per_filter(filter_norm(weight, problem.operator.eps), filters, groups)
    c = u / a / b

    mean = None
    rho = None
    if radius is not None:
        rho = radius
        if problem.norm == records.NORM_BATCH:
            mean = mean_norm(b_map)
            rho = radius * (mean if problem.norm_grad else mean.detach())
        elif problem.norm == records.NORM_GIVEN:
            assert norm_mean is not None
            rho = radius * norm_mean
        # Slope 1 on the floor, 0 below; NaN passes.
        floor = constant("RHO_FLOOR")
        rho = torch.where(rho < floor, floor, rho)
        rho = per_filter(rho, filters, groups)

    h = weighted_magnitude(
        operator.magnitude, operator.weighting, a, b, rho, operator.alpha, operator.beta
    )
    curvature = None if k is None else per_filter(k, filters, groups)
    g = angulars[operator.angular].value(c, curvature, operator.power, problem.delta)
    # g first, which has the convolution's layout: that of a map times numbers per filter is none.
    y = (g * h).flatten(1, 2) if groups > 1 else g * h
    if bias is not None:
        y = y + bias.to(compute).reshape(-1, 1, 1)
    y = y.to(x.dtype)
    if y.stride() != dot.stride():
        last = dot.stride(3) == filters
        y = y.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    return y, mean


def decoupled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    magnitude: str = Operator.magnitude,
    angular: str = Operator.angular,
    weighting: str = Operator.weighting,
    alpha: float = Operator.alpha,
    beta: float = Operator.beta,
    radius: Tensor | float = records.RADIUS,
    norm_mean: Tensor | str | None = None,
    k: Tensor | float = records.CURVATURE,
    power: float = Operator.power,
    eps: float = Operator.eps,
    padding_mode: str = "zeros",
) -> Tensor:
    """Decoupled convolution by plain PyTorch operations; ``functional.decoupled_conv2d`` is faster.

    Arguments, shapes, dtypes and errors are those of :func:`dcconv.functional.decoupled_conv2d`
    without ``keep`` and ``backend``. The formula stands at the top of this module.

    Example:
        >>> import torch
        >>> from dcconv import reference
        >>> y = reference.decoupled_conv2d(torch.zeros(1, 3, 4, 4), torch.ones(2, 3, 3, 3))
        >>> y.shape, float(y.abs().max())
        (torch.Size([1, 2, 2, 2]), 0.0)
    """
    operator = Operator(magnitude, angular, weighting, alpha, beta, power, eps)
    geometry = Geometry(stride, padding, dilation, groups, padding_mode)
    operands, problem = arguments.convolution(
        x, weight, bias, radius, norm_mean, k, operator, geometry
    )
    y, _ = forward(operands, problem)
    return y if x.dim() == 4 else y.squeeze(0)


def patch_norm(
    x: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    eps: float = Operator.eps,
    padding_mode: str = "zeros",
) -> Tensor:
    """Patch norm b = sqrt(||x_p||^2 + eps) by plain PyTorch operations.

    Arguments, shapes and errors are those of :func:`dcconv.functional.patch_norm` without
    ``backend``.

    Example:
        >>> import torch
        >>> from dcconv import reference
        >>> reference.patch_norm(torch.ones(1, 4, 2, 2), 1, eps=1e-8).round()
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    geometry = Geometry(stride, padding, dilation, groups, padding_mode)
    batched, kernel, problem = arguments.patch_norm(x, kernel_size, geometry, eps)
    b = window_norm(batched, kernel, problem)
    return b if x.dim() == 4 else b.squeeze(0)
