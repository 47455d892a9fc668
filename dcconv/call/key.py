"""What a choice between strategies depends on: the static facts of one direction of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import TF32_ANGLE_DELTA
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import records
from dcconv.tracing import asked_once, has_static_value

DIRECTIONS = records.DIRECTIONS
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = DIRECTIONS

TF32 = "tf32"


class Key(NamedTuple):
    """One direction of one call.

    Attributes:
        backend: its name.
        direction: one of ``DIRECTIONS``.
        device: the GPU's name.
        dtype: of x, as ``bfloat16``; ``tf32`` is float32 where PyTorch may convolve in TF32.
        layout: ``channels_last`` or ``contiguous``, that of the result.
        n, h, w: sizes of x; None where tracing keeps them open.
        c, o, r, s: channels of all groups, filters, rows and columns of a filter.
        stride, padding, dilation, groups, padding_mode: as in ``Problem``; a padding that depends
            on an open size is None.
        operator: magnitude, angular and weighting; forward only.
        norm: as in ``Problem`` in forward; ``batch`` in the gradient of the input if that waits for
            a sum over all patches, else ``none``.
        kept: what backward keeps (``dcconv.call.saved``); forward only.
        bias: whether one is added; forward only.
    """

    backend: str
    direction: str
    device: str
    dtype: str
    layout: str
    n: int | None
    h: int | None
    w: int | None
    c: int
    o: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int | None, ...]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    operator: str = ""
    norm: str = ""
    kept: str = ""
    bias: bool = False

    @property
    def sizes(self) -> tuple[int | None, int | None, int | None]:
        """n, h and w: what stands beside the text in a table."""
        return self.n, self.h, self.w

    @property
    def text(self) -> str:
        """Everything but the device and the sizes, in the form that tables are written in.

        Example:
            >>> Key("cuda", "weight_gradient", "NVIDIA H100", "tf32", "contiguous", 8, 56, 56, 64,
            ...     64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 64, "zeros").text
            'cuda weight_gradient tf32 contiguous c64 o64 k3x3 s1x1 p1,1,1,1 d1x1 g64 zeros'
        """
        stride, dilation = ("{}x{}".format(*steps) for steps in (self.stride, self.dilation))
        padding = ",".join("?" if size is None else str(size) for size in self.padding)
        text = (
            f"{self.backend} {self.direction} {self.dtype} {self.layout} "
            f"c{self.c} o{self.o} k{self.r}x{self.s} "
            f"s{stride} p{padding} d{dilation} g{self.groups} {self.padding_mode}"
        )
        if self.direction == FORWARD:
            bias = " bias" if self.bias else ""
            return f"{text} {self.operator} norm={self.norm} kept={self.kept}{bias}"
        return f"{text} norm={self.norm}" if self.direction == INPUT_GRADIENT else text


@asked_once
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(x: Tensor) -> str:
    """Return the name of the GPU that a tensor is on, and of other devices their type."""
    return _gpu_name(x.device.index) if x.device.type == "cuda" else x.device.type


def _fixed(size: int) -> int:
    """Return a size as a number, also where tracing would keep it open: filters are parameters."""
    return len(range(size))


def _known(size: int) -> int | None:
    # Static may also mean a symbol with one possible value.
    return _fixed(size) if has_static_value(size) else None


def _precision(x: Tensor, problem: Problem) -> str:
    # The call's checks have asked PyTorch: by the answer they set the floor of (1 - c)(1 + c).
    if x.dtype == torch.float32 and problem.delta == TF32_ANGLE_DELTA:
        return TF32
    return str(x.dtype).removeprefix("torch.")


def key_of(backend: str, operands: Operands, problem: Problem, kept: str, direction: str) -> Key:
    """Return the key of one direction of a call; ``kept`` is what its backward keeps."""
    x, weight = operands.x, operands.weight
    channels_last = memory_format(x, weight) == torch.channels_last
    layout = "channels_last" if channels_last else "contiguous"
    n, _, h, w = [_known(size) for size in x.shape]
    o, per_group, r, s = [_fixed(size) for size in weight.shape]
    stride, padding, dilation, groups, mode = problem.window
    pixels = tuple([_known(size) for size in padding])
    call = (backend, direction, device_name(x), _precision(x, problem), layout)
    filters = (per_group * groups, o, r, s)
    key = Key(*call, n, h, w, *filters, stride, pixels, dilation, groups, mode)
    if direction == FORWARD:
        return key._replace(
            operator=" ".join(problem.operator.constants[:3]),
            norm=problem.norm,
            kept=kept,
            bias=operands.bias is not None,
        )
    if direction == INPUT_GRADIENT:
        barrier = problem.norm == NORM_BATCH and problem.norm_grad
        return key._replace(norm=NORM_BATCH if barrier else "none")
    return key
