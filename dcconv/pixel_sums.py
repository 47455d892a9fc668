"""Sums of the squares of a tensor per pixel, handed from what wrote it to what reads it next.

They are an attribute of the tensor: any operation makes another tensor, which is without it. A
change in place is told by the version that autograd counts; where nothing counts, in inference
mode, nothing is handed on. So it is wherever the tensor may stand for others: while something
traces, transforms or watches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcconv.operator.layout import memory_format
from dcconv.operator.records import Operands, Problem

_NAME = "_dcconv_pixel_sums"


class PixelSums(NamedTuple):
    """The sums, and which they are.

    Attributes:
        sums: of squares per pixel and group in compute dtype, 1-d, as passes have maps.
        groups: of channels.
        channels_last: whether they are [n, pixels, groups]; else [n, groups, pixels].
    """

    sums: Tensor
    groups: int
    channels_last: bool

    def fitting(self, operands: Operands, problem: Problem) -> Tensor | None:
        """Return the sums as a call needs them; None where it has other groups or layouts."""
        if self.groups != problem.window.groups:
            return None
        last = memory_format(operands.x, operands.weight) == torch.channels_last
        return self.sums if self.groups == 1 or last == self.channels_last else None


class _Mark:
    """What a tensor carries: its sums while it is the tensor that they were found for."""

    __slots__ = ("before_relu", "memory", "owner", "sums", "version")

    def __init__(self, y: Tensor, sums: PixelSums, before_relu: bool) -> None:
        self.sums, self.before_relu = sums, before_relu
        # Not y itself, which would be a reference cycle.
        self.owner, self.memory, self.version = id(y), y.data_ptr(), y._version

    def is_of(self, x: Tensor) -> bool:
        """Whether x is the marked tensor, as it was: a copy has its attributes, too."""
        return self.owner == id(x) and self.version == x._version and self.memory == x.data_ptr()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of tensors take attributes along: an empty set says nothing, and
        # torch.load builds it with weights_only.
        return set, ()


def is_watched() -> bool:
    """Whether something traces, transforms or watches what runs."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def hand_on(y: Tensor, sums: PixelSums, before_relu: bool) -> None:
    """Give a new tensor the sums of its squares.

    Args:
        y: [n, c, h, w], with no negative values.
        sums: of its squares.
        before_relu: whether a ReLU may return y itself for its result.
    """
    if not y.is_inference():
        setattr(y, _NAME, _Mark(y, sums, before_relu))


def _mark_of(x: Tensor) -> _Mark | None:
    mark = None if torch.compiler.is_compiling() else getattr(x, _NAME, None)
    if not isinstance(mark, _Mark) or is_watched() or not mark.is_of(x):
        return None
    return mark


def of(x: Tensor) -> PixelSums | None:
    """Return the sums of the squares of x that it came with, while x is as it was."""
    mark = _mark_of(x)
    return None if mark is None else mark.sums


def is_rectified(x: Tensor) -> bool:
    """Whether x is its own ReLU, and who wrote it has a ReLU behind it that may hand it through."""
    mark = _mark_of(x)
    return mark is not None and mark.before_relu
