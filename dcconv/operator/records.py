"""The static description of one call: geometry, operator and numerics, checked once.

A ``Problem`` is what a backend is asked about, what an op receives and what an error message, a
test case and a benchmark row are made of. Letters: n batch, c/h/w input, o filters, p/q output,
r/s filter rows and columns, g groups.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from dcconv.operator.functions import angulars, weightings
from dcconv.operator.numerics import ANGLE_DELTA, EPS, compute_dtype
from dcconv.tracing import recording

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# Most rows and columns of windows, strides, dilations and paddings, and most elements of a tensor
# that a call makes: sums and products of a few of them fit 64 bits (csrc/check.h has the same).
MOST_PIXELS = 2**31 - 1
MOST_ELEMENTS = 2**50

NORM_NONE, NORM_BATCH, NORM_GIVEN = "none", "batch", "given"


class Problem(NamedTuple):
    """One call of the operator, tensors apart.

    Attributes:
        stride, dilation: rows and columns, in pixels.
        padding: top, bottom, left, right, in pixels.
        groups: number of channel groups.
        padding_mode: one of ``PADDING_MODES``.
        magnitude, angular, weighting: names in ``dcconv.operator.functions``.
        alpha, beta, power, eps: operator constants.
        norm: ``none`` (rho = radius), ``batch`` (times this batch's mean norm) or ``given``.
        norm_grad: whether the gradient flows through the batch's mean norm.
        delta: floor of (1 - c)(1 + c) in angular derivatives.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    magnitude: str = "tanh"
    angular: str = "cosine"
    weighting: str = "none"
    alpha: float = 1.0
    beta: float = 0.5
    power: float = 2.0
    eps: float = EPS
    norm: str = NORM_NONE
    norm_grad: bool = True
    delta: float = ANGLE_DELTA[torch.float32]

    @property
    def uses_k(self) -> bool:
        """Whether the operator has a curvature."""
        return angulars[self.angular].uses_k

    @property
    def norm_free(self) -> bool:
        """Whether the patch norm cancels: alpha b c = alpha u / a needs no norm at all."""
        return (
            self.magnitude == "linear"
            and self.angular == "cosine"
            and weightings[self.weighting].only_with is None
        )

    @property
    def symmetric_zeros(self) -> bool:
        """Whether a library convolution takes this padding as it is."""
        top, bottom, left, right = self.padding
        if torch.compiler.is_compiling() and not (
            has_static_value(top + left) and has_static_value(bottom + right)
        ):
            return False  # a guard on the answer would bind sizes that are left open
        return self.padding_mode == "zeros" and top == bottom and left == right


class Operands(NamedTuple):
    """The tensors of one call, after the checks.

    Attributes:
        x: [n, c, h, w].
        weight: [o, c / groups, r, s].
        bias: [o] or None.
        radius: [] or [o], compute dtype; None for operators without one.
        norm_mean: [], compute dtype; None unless ``Problem.norm`` is ``given``.
        k: [] or [o], compute dtype; None for operators without one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    radius: Tensor | None
    norm_mean: Tensor | None
    k: Tensor | None


def output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Return the number of windows along one axis: floor((padded - extent) / stride) + 1."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding of one axis: ceil(size / stride) outputs, extra at the end.

    At stride 1 this is PyTorch's ``same``, whatever the size. Other sizes may be symbols of a
    compiler: nothing is asked of them.
    """
    extent = dilation * (kernel - 1) + 1
    if extent == 1:
        return 0, 0
    # The last window begins with the last 1 to ``stride`` pixels.
    begun = 1 if stride == 1 else (size - 1) % stride + 1
    total = extent - begun
    if extent < stride:
        total = cast(int, torch.sym_max(total, 0))
    before = total // 2
    return before, total - before


def may_change(value: Tensor) -> bool:
    """Return whether a tensor that backward keeps may be written to before, without an error.

    Learned ones raise PyTorch's error then. ``torch.jit.trace`` compares what it records with and
    without gradients: there the answer is the same.
    """
    return (torch.is_grad_enabled() and not value.requires_grad) or recording()


def as_compute(value: Tensor | float | None, x: Tensor) -> Tensor | None:
    """Return a parameter as a tensor of x's device and compute dtype; None stays None.

    What is not learned, statistics above all, may change in place before backward, which keeps the
    value of its forward: a copy, but where no gradient is taken.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        changes = may_change(value)
        if changes and value.dim() == 0 and torch.compiler.is_compiling():
            # A sum of one. Compiled code saves the source of a copy and makes the copy in backward;
            # sums it keeps.
            return value.to(compute_dtype(x.dtype)).sum()
        return value.to(compute_dtype(x.dtype), copy=changes)
    return torch.full((), value, dtype=compute_dtype(x.dtype), device=x.device)


def knows_autocast(x: Tensor) -> bool:
    """Whether x's device knows autocast at all; meta does not, and asking it would raise."""
    return torch.amp.is_autocast_available(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for x's device."""
    if knows_autocast(x) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
