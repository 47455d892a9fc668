"""What is measured: operators, modes, dtypes, layouts and passes as data, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.layers import Layer
from bench.options import DTYPES, LAYOUTS
from dcconv.operator import reference
from dcconv.operator.checks import choice, value_error
from dcconv.operator.functions import angulars, magnitudes


class Operator(NamedTuple):
    """A magnitude and an angular function, and the modes its radius can be measured in."""

    magnitude: str
    angular: str

    @property
    def name(self) -> str:
        """The name typed after ``--operators``."""
        return f"{self.magnitude}-{self.angular}"

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that exist for it."""
        return (FIXED, BATCH) if magnitudes[self.magnitude].uses_rho else (NO_RHO,)


# fixed: rho = radius * a given scalar. batch: rho = radius * the mean norm of this call, gradient
# included. no-rho: the operator has no radius.
FIXED, BATCH, NO_RHO = MODES = ("fixed", "batch", "no-rho")

#: What is measured where no operator is named: a smooth and a kinked one with a radius, and the one
#: whose patch norm cancels.
OPERATORS = ("tanh-cosine", "ball-square_cosine", "linear-cosine")


def find_operator(name: str) -> Operator:
    """Return the operator of a name ``<magnitude>-<angular>``.

    Raises:
        ValueError: there is no such operator; the message lists what there is.

    Example:
        >>> find_operator("ball-square_cosine")
        Operator(magnitude='ball', angular='square_cosine')
    """
    magnitude, _, angular = name.partition("-")
    if magnitude not in magnitudes or angular not in angulars:
        rule = (
            "be <magnitude>-<angular> "
            f"(magnitude: {', '.join(magnitudes)}; angular: {', '.join(angulars)})"
        )
        raise value_error("--operators", rule, repr(name))
    return Operator(magnitude, angular)


class Case(NamedTuple):
    """One configuration: everything of a row but its pass."""

    layer: Layer
    operator: Operator
    mode: str
    dtype: str
    layout: str = "channels_last"

    @property
    def name(self) -> str:
        """A readable id."""
        parts = (self.layer.name, self.operator.name, self.mode, self.dtype, self.layout)
        return " ".join(parts)


def select(
    layers: Iterable[Layer],
    operators: Iterable[str],
    modes: Iterable[str],
    dtypes: Iterable[str],
    layouts: Iterable[str],
) -> list[Case]:
    """Return the cases of layers, operators, modes, dtypes and layouts that exist."""
    chosen = [find_operator(name) for name in operators]
    layers, modes, layouts = list(layers), list(modes), list(layouts)
    for mode in modes:
        choice("--modes", mode, MODES)
    return [
        Case(layer, operator, mode, dtype, layout)
        for dtype in dtypes
        for layout in layouts
        for layer in layers
        for operator in chosen
        for mode in operator.modes
        if mode in modes
    ]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case, and the cotangent of its output.

    Attributes:
        x: [n, c, h, w], in the case's layout, requires grad.
        weight: [o, c / groups, r, s], in the case's layout, requires grad.
        radius: [o], float32 (float64 with float64 x), requires grad; None without a radius.
        norm_mean: [], like ``radius``; None unless the mode is ``fixed``.
        cotangent: [n, o, p, q], in the case's layout.
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
    wanted = values.double()
    above = torch.searchsorted(middles, wanted).clamp(1, len(middles) - 1)
    low, high = middles[above - 1], middles[above]
    return torch.where(wanted - low <= high - wanted, low, high).to(values.dtype)


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Draw the tensors of a case on a device from a fixed seed."""
    layer, dtype = case.layer, DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=wide) * scale
        return values.to(dtype).contiguous(memory_format=LAYOUTS[case.layout])

    x = draw(layer.x_shape)
    weight = draw(layer.weight_shape, layer.patch_size**-0.5)
    cotangent = draw(layer.y_shape)
    radius = norm_mean = None
    if case.mode != NO_RHO:
        geometry = (layer.k, layer.stride, layer.padding, layer.dilation, layer.groups)
        # Around 1 in units of the mean norm: ball has patches on both sides of its radius.
        norms = reference.patch_norm(x.double(), *geometry)
        radius = 0.5 + torch.rand(layer.o, generator=generator, device=device, dtype=wide)
        radius = between(radius, (norms / norms.mean()).flatten()).requires_grad_()
        if case.mode == FIXED:
            norm_mean = reference.patch_norm(x, *geometry).mean()
    return Inputs(x.requires_grad_(), weight.requires_grad_(), radius, norm_mean, cotangent)
