"""The library's convolution and its gradients, as passes take them: dense, in one layout."""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv.operator import convolution, reference
from dcconv.operator.layout import memory_format
from dcconv.operator.records import Problem


def size_of(t: Tensor) -> list[int]:
    """Return rows and columns of images or filters."""
    return [t.shape[2], t.shape[3]]


def dense(t: Tensor, layout: torch.memory_format) -> Tensor:
    """Return a new tensor with exactly the strides that torch.empty gives, copied if need be.

    The library numbers the strides of one-element axes its own way. They are changed in place: a
    view made here could not be modified in place by the user.
    """
    t = t.contiguous(memory_format=layout)
    _, c, h, w = t.shape
    last = layout == torch.channels_last
    strides = (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided_(t.shape, strides)


def _library_input(
    x: Tensor, problem: Problem, layout: torch.memory_format
) -> tuple[Tensor, list[int]]:
    """Return x as the library gets it, padded where it cannot pad, and the padding left to it."""
    library_x, padding = reference.padded(x, problem)
    return library_x.contiguous(memory_format=layout), list(padding)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, layout: torch.memory_format
) -> Tensor:
    """Return u, dense in a layout."""
    library_x, padding = _library_input(x, problem, layout)
    stride, _, dilation, groups, _ = problem.window
    u = convolution.conv2d(library_x, weight, bias, stride, padding, dilation, groups)
    return dense(u, layout)


def backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, problem: Problem, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the library's gradients of (padded) x, weight and bias, dense; None if not wanted."""
    if not any(wanted):
        return None, None, None
    layout = memory_format(x, weight)
    library_x, padding = _library_input(x, problem, layout)
    stride, _, dilation, groups, _ = problem.window
    geometry = (stride, padding, dilation, groups)
    grad_x, grad_weight, grad_bias = convolution.conv2d_backward(
        grad_u, library_x, weight, *geometry, wanted
    )
    own = memory_format(weight)
    return (
        None if grad_x is None or not wanted[0] else dense(grad_x, layout),
        None if grad_weight is None or not wanted[1] else dense(grad_weight, own),
        grad_bias,
    )
