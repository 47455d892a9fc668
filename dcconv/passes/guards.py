"""What ops require of sizes before they divide, multiply or follow pointers.

For the ops and fakes that are written in Python; those of ``csrc`` say the same in C++
(``csrc/arguments.h``). Callers of the package's functions meet ``dcconv.operator.checks`` first.
Symbolic numbers, which tracing makes of sizes of tensors, pass: a comparison would tie the traced
program to them, and the composition that it comes from has made them fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcconv.operator.checks import PADDING_MODES
from dcconv.operator.numerics import MOST_ELEMENTS, MOST_PIXELS
from dcconv.operator.records import Window, output_size
from dcconv.passes import records


def error(argument: str, rule: str, got: object) -> RuntimeError:
    """Build the house sentence in the class that compiled ops raise."""
    return RuntimeError(f"dcconv: {argument} must {rule}, got {got}")


def _known(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)


def numbers(argument: str, values: Sequence[Any], count: int) -> None:
    """Require so many numbers."""
    if len(values) != count:
        raise error(argument, f"be {count} numbers", list(values))


def bounded(argument: str, value: Any, low: int) -> None:
    """Require a number from ``low`` to below 2^31."""
    if _known(value) and not low <= value <= MOST_PIXELS:
        raise error(argument, f"be at least {low} and below 2^31", value)


def countable(argument: str, sizes: Sequence[Any]) -> None:
    """Require sizes of a tensor that has no more elements than fit 64 bits many times."""
    if _known(*sizes) and math.prod(max(size, 1) for size in sizes) > MOST_ELEMENTS:
        raise error(argument, "have at most 2^50 elements", list(sizes))


def partial_sums(sums: int, rows: Any, filters: Any) -> None:
    """Require bits of known sums, and a number of partial sums that there is room for."""
    every = records.SUM_RHO | records.SUM_A | records.SUM_K | records.SUM_BIAS
    if not 0 <= sums <= every:
        raise error("sums", f"be bits of {every}", sums)
    bounded("rows", rows, 1)
    countable("parts", [4, rows, filters])


def dimensions(argument: str, t: Tensor, count: int) -> None:
    """Require so many dimensions."""
    if t.dim() != count:
        raise error(argument, f"have {count} dimensions", list(t.shape))


def shape(argument: str, t: Tensor, sizes: Sequence[Any]) -> None:
    """Require a shape."""
    if _known(*t.shape, *sizes) and list(t.shape) != list(sizes):
        raise error(argument, f"have shape {list(sizes)}", list(t.shape))


def values(argument: str, t: Tensor, count: Any) -> None:
    """Require so many values in one dimension."""
    shape(argument, t, [count])


def one_value(argument: str, t: Tensor | None) -> None:
    """Require one value, or none."""
    if t is not None and _known(*t.shape) and t.numel() != 1:
        raise error(argument, "be one value", f"shape {list(t.shape)}")


def parameter(argument: str, t: Tensor | None, filters: Any) -> None:
    """Require a [] or [o] parameter, or none."""
    if t is not None and t.dim():
        shape(argument, t, [filters])


def dtype(argument: str, t: Tensor | None, wanted: torch.dtype) -> None:
    """Require a dtype, or no tensor."""
    if t is not None and t.dtype != wanted:
        raise error(argument, f"have dtype {wanted}", t.dtype)


def groups(groups: Any, channels: Any, filters: Any) -> None:
    """Require a number that divides channels and filters, of which there are some."""
    for name, count in (("channels of x", channels), ("filters of weight", filters)):
        if _known(groups, count) and (groups < 1 or count < 1 or count % groups):
            raise error("groups", f"divide the {count} {name}", groups)


def padding_mode(mode: str) -> None:
    """Require a known padding mode."""
    if mode not in PADDING_MODES:
        raise error("padding_mode", f"be one of {', '.join(PADDING_MODES)}", repr(mode))


def _axis(
    size: Any, kernel: Any, stride: Any, before: Any, after: Any, dilation: Any, mode: str
) -> Any:
    bounded("kernel_size", kernel, 1)
    bounded("stride", stride, 1)
    bounded("padding", before, 0)
    bounded("padding", after, 0)
    bounded("dilation", dilation, 1)
    if _known(size, kernel, before, after, dilation):
        extent, padded = dilation * (kernel - 1) + 1, size + before + after
        if padded < extent:
            rule = f"be at least as large as the dilated kernel {extent} after padding"
            raise error("x", rule, padded)
        edge = max(before, after)
        if mode == "reflect" and edge and edge >= size:
            raise error("padding", f"be below the size {size} for 'reflect'", edge)
        if mode == "circular" and edge > size:
            raise error("padding", f"be at most the size {size} for 'circular'", edge)
        if mode == "replicate" and edge and size == 0:
            raise error("x", "have a size of at least 1 for 'replicate'", size)
    return output_size(size, kernel, stride, before, after, dilation)


def windows(
    sizes: Sequence[Any], filters: Any, kernel_size: Sequence[Any], window: Window
) -> tuple[Any, Any]:
    """Return the rows and columns of windows.

    Args:
        sizes: n, c, h, w of x.
        filters: how many.
        kernel_size, window: as ops take them.

    Raises:
        RuntimeError: a number is none that kernels can divide by or multiply.
    """
    stride, padding, dilation, in_groups, mode = window
    numbers("x", sizes, 4)
    numbers("kernel_size", kernel_size, 2)
    numbers("stride", stride, 2)
    numbers("padding", padding, 4)
    numbers("dilation", dilation, 2)
    groups(in_groups, sizes[1], filters)
    padding_mode(mode)
    n, c, h, w = sizes
    top, bottom, left, right = padding
    p = _axis(h, kernel_size[0], stride[0], top, bottom, dilation[0], mode)
    q = _axis(w, kernel_size[1], stride[1], left, right, dilation[1], mode)
    countable("x after padding", [n, c, h + top + bottom, w + left + right])
    countable("the result", [n, filters, p, q])
    return p, q


def filters_of(x: Tensor, weight: Tensor, in_groups: Any) -> None:
    """Require a [o, c / groups, r, s] weight that fits x, [n, c, h, w]."""
    dimensions("x", x, 4)
    dimensions("weight", weight, 4)
    dtype("weight", weight, x.dtype)
    groups(in_groups, x.shape[1], weight.shape[0])
    per_group = weight.shape[1]
    if _known(x.shape[1], in_groups, per_group) and per_group != x.shape[1] // in_groups:
        rule = f"be in_channels / groups = {x.shape[1] // in_groups}"
        raise error("weight.size(1)", rule, per_group)
