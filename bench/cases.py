"""What is measured: layers, operators, modes, dtypes and passes as data, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dcconv import reference


class Layer(NamedTuple):
    """A convolution layer with padding k // 2.

    Attributes:
        n: batch.
        c: input channels.
        size: height and width of the input.
        o: filters.
        k: kernel size.
        stride: pixels.
    """

    n: int
    c: int
    size: int
    o: int
    k: int
    stride: int = 1

    @property
    def name(self) -> str:
        """The numbers, as typed after ``--layers``; a stride of 1 is left out."""
        return ",".join(str(number) for number in (self if self.stride > 1 else self[:5]))

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """[n, c, h, w]."""
        return self.n, self.c, self.size, self.size

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[o, c, r, s]."""
        return self.o, self.c, self.k, self.k

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """[n, o, p, q]."""
        out = (self.size + 2 * self.padding - self.k) // self.stride + 1
        return self.n, self.o, out, out

    @property
    def padding(self) -> int:
        """Pixels on each side."""
        return self.k // 2


class Operator(NamedTuple):
    """A magnitude and an angular function, and the modes its radius can be measured in."""

    magnitude: str
    angular: str
    modes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name typed after ``--operators``."""
        return f"{self.magnitude}-{self.angular}"


# fixed: rho = radius * a given scalar. batch: rho = radius * the mean norm of this call, gradient
# included. no-rho: the operator has no radius.
FIXED, BATCH, NO_RHO = MODES = ("fixed", "batch", "no-rho")

FORWARD, BOTH = PASSES = ("forward", "forward+backward")

LAYERS: dict[str, Layer] = {
    layer.name: layer
    for layer in (
        Layer(8, 64, 56, 64, 3),
        Layer(8, 256, 56, 64, 1),
        Layer(8, 64, 56, 256, 1),
        Layer(64, 16, 32, 16, 3),
        Layer(64, 96, 32, 96, 3),
        Layer(64, 192, 16, 192, 3),
        Layer(64, 384, 8, 384, 3),
    )
}

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("tanh", "cosine", (FIXED, BATCH)),
        Operator("ball", "square_cosine", (FIXED, BATCH)),
        Operator("linear", "cosine", (NO_RHO,)),
    )
}

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

QUICK_LAYERS = ("8,64,56,64,3", "8,256,56,64,1")


class Case(NamedTuple):
    """One configuration: everything of a row but its pass."""

    layer: Layer
    operator: Operator
    mode: str
    dtype: str

    @property
    def name(self) -> str:
        """A readable id."""
        return f"{self.layer.name} {self.operator.name} {self.mode} {self.dtype}"


def select(
    layers: Iterable[str], operators: Iterable[str], modes: Iterable[str], dtypes: Iterable[str]
) -> list[Case]:
    """Return the cases of the named layers, operators, modes and dtypes that exist."""
    operators, modes, layers = list(operators), list(modes), list(layers)
    return [
        Case(LAYERS[layer], OPERATORS[operator], mode, dtype)
        for dtype in dtypes
        for layer in layers
        for operator in operators
        for mode in OPERATORS[operator].modes
        if mode in modes
    ]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case, and the cotangent of its output.

    Attributes:
        x: [n, c, h, w], channels_last, requires grad.
        weight: [o, c, r, s], channels_last, requires grad.
        radius: [o], float32 (float64 with float64 x), requires grad; None without a radius.
        norm_mean: [], like ``radius``; None unless the mode is ``fixed``.
        cotangent: [n, o, p, q], channels_last.
    """

    x: Tensor
    weight: Tensor
    radius: Tensor | None
    norm_mean: Tensor | None
    cotangent: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors whose gradients are computed."""
        found = {"x": self.x, "weight": self.weight}
        if self.radius is not None:
            found["radius"] = self.radius
        return found

    @property
    def parameters(self) -> list[Tensor]:
        """Every tensor a layer owns, whatever its backward keeps."""
        return [t for t in (self.weight, self.radius, self.norm_mean) if t is not None]

    def double(self) -> Inputs:
        """Return float64 copies, for the reference."""

        def copy(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        x, weight, cotangent = copy(self.x), copy(self.weight), copy(self.cotangent)
        assert x is not None
        assert weight is not None
        assert cotangent is not None
        return Inputs(x, weight, copy(self.radius), copy(self.norm_mean), cotangent)


def between(values: Tensor, points: Tensor, width: float = 1e-5) -> Tensor:
    """Move each value into the nearest gap between points that is relatively wider than ``width``.

    At b = rho the slope of ball and segmented jumps. Of a million pairs some would be closer than
    rounding, and then no two float32 programs agree on the gradient.

    Example:
        >>> import torch
        >>> between(torch.tensor([1.0]), torch.tensor([0.9, 1.0, 1.3], dtype=torch.float64))
        tensor([0.9500])
    """
    points = points.unique()
    middles = (points[1:] + points[:-1]) / 2
    middles = middles[(points[1:] - points[:-1]) > width * middles]
    nearest = (values.double().unsqueeze(1) - middles).abs().argmin(dim=1)
    return middles[nearest].to(values.dtype)


def make_inputs(case: Case) -> Inputs:
    """Draw the tensors of a case from a fixed seed."""
    layer, dtype = case.layer, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    x = draw(layer.x_shape)
    weight = draw(layer.weight_shape, (layer.c * layer.k**2) ** -0.5)
    cotangent = draw(layer.y_shape)
    radius = norm_mean = None
    if case.mode != NO_RHO:
        # Around 1 in units of the mean norm: ball has patches on both sides of its radius.
        norms = reference.patch_norm(x.double(), layer.k, layer.stride, layer.padding)
        radius = 0.5 + torch.rand(layer.o, generator=generator)
        radius = between(radius, (norms / norms.mean()).flatten()).requires_grad_()
    if case.mode == FIXED:
        norm_mean = reference.patch_norm(x, layer.k, layer.stride, layer.padding).mean()
    return Inputs(x.requires_grad_(), weight.requires_grad_(), radius, norm_mean, cotangent)
