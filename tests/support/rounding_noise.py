"""How far rounding alone moves a problem's results: its condition, measured.

The reference runs in float64, and everything it forms on the way, in both directions, is moved by
a rounding error of the tested dtype, up or down at random. Parker's Monte Carlo arithmetic; what is
moved and why stands in docs/accuracy.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dcconv.operator import convolution, functions, reference
from dcconv.operator.numerics import compute_dtype


class Noise:
    """One draw of all rounding errors of a call.

    Args:
        dtype: of x: u, and what goes back through u, may be stored in it.
        seed: of the draw.
        alike: whether all elements of a tensor are moved the same way, as they are where operands
            are constant.
    """

    def __init__(self, dtype: torch.dtype, seed: int, alike: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.alike = alike
        self.storage = torch.finfo(dtype).eps / 2
        self.compute = torch.finfo(compute_dtype(dtype)).eps / 2

    def signs(self, like: Tensor) -> Tensor:
        """Return -1 and 1 at random."""
        shape = () if self.alike else like.shape
        return torch.randint(0, 2, shape, generator=self.generator).to(like) * 2 - 1

    def moved(self, value: Tensor, unit: float) -> Tensor:
        """Return the value moved by a part of itself."""
        return value + value * (self.signs(value) * unit)

    def __call__(self, value: Tensor) -> Tensor:
        """Round a value and its gradient in compute dtype."""
        rounded: Tensor = _Rounding.apply(value, self)
        return rounded

    @contextlib.contextmanager
    def in_the_reference(self) -> Iterator[None]:
        """Let the reference round u, the norms and their mean, c, g, h, and their gradients."""

        def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *args: self(function(*args))

        def window_norm(*args: Any) -> Tensor:
            with mock.patch.object(reference, "convolution", convolution):
                return self(original(*args))

        def conv2d(x: Tensor, weight: Tensor, bias: None, *geometry: Any) -> Tensor:
            rounded: Tensor = _RoundingConvolution.apply(x, weight, geometry, self)
            return rounded

        def angular(entry: functions.Angular) -> functions.Angular:
            def value(c: Tensor, *args: Any) -> Tensor:
                return self(entry.value(self(c), *args))

            return replace(entry, value=value)

        original = reference.window_norm
        rounding = mock.Mock(wraps=convolution)
        rounding.conv2d = conv2d
        noisy = {name: angular(entry) for name, entry in functions.angulars.items()}
        changed = {
            "convolution": rounding,
            "window_norm": window_norm,
            "filter_norm": norm(reference.filter_norm),
            "mean_norm": norm(reference.mean_norm),
            "weighted_magnitude": norm(reference.weighted_magnitude),
            "angulars": noisy,
        }
        with contextlib.ExitStack() as stack:
            for name, value in changed.items():
                stack.enter_context(mock.patch.object(reference, name, value))
            yield


class _Rounding(torch.autograd.Function):
    """The identity, moved by a relative rounding error in both directions."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, noise: Noise) -> Tensor:
        ctx.noise = noise
        return noise.moved(value, noise.compute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.noise.moved(grad, ctx.noise.compute), None


class _RoundingConvolution(torch.autograd.Function):
    """A convolution whose sums of products are moved by a part of the sum of their sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Any, noise: Noise) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.noise = geometry, noise
        u = F.conv2d(x, weight, None, *geometry)
        size = F.conv2d(x.abs(), weight.abs(), None, *geometry)
        return noise.moved(u, noise.storage) + size * noise.signs(u) * noise.compute

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        noise = ctx.noise

        def gradients(*operands: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [t.requires_grad_() for t in operands[:2]]
                u = F.conv2d(*leaves, None, *ctx.geometry)
            return list(torch.autograd.grad(u, leaves, operands[2]))

        grad = noise.moved(grad, noise.storage)
        exact = gradients(x.detach(), weight.detach(), grad)
        sizes = gradients(x.detach().abs(), weight.detach().abs(), grad.abs())
        moved = [g + s * noise.signs(g) * noise.compute for g, s in zip(exact, sizes, strict=True)]
        return (*moved, None, None)
