"""The table of test problems: geometries, operators, layouts, and random operands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcconv.cudnn import epilogue
from dcconv.operator.functions import angulars, magnitudes, weightings
from dcconv.operator.numerics import compute_dtype

#: Names of the differentiable arguments, in the order of the functional.
TENSORS = ("x", "weight", "bias", "radius", "norm_mean", "k")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced")

#: The operator family of the paper: its magnitudes, whether they have a radius, and its angular
#: functions, whether they have a curvature. More may be registered.
MAGNITUDES_OF_PAPER = {
    "sphere": False,
    "ball": True,
    "tanh": True,
    "linear": False,
    "segmented": True,
    "log": False,
    "mix": False,
}
ANGULARS_OF_PAPER = {
    "linear": False,
    "cosine": False,
    "sigmoid": True,
    "square_cosine": False,
    "power": False,
}

#: Every valid (magnitude, weighting) that is registered.
WEIGHTED_MAGNITUDES = tuple(
    (name, weighting.name)
    for weighting in weightings.values()
    for name in magnitudes
    if weighting.only_with in (None, name)
)

ANGULARS = tuple(angulars)

#: All operators, 80 of them the paper's: (magnitude, weighting, angular).
OPERATORS = tuple((m, w, a) for m, w in WEIGHTED_MAGNITUDES for a in ANGULARS)

#: Those that are written in steps; the strategy graph refuses the others.
IN_STEPS = tuple(
    (m, w, a) for m, w, a in OPERATORS if m in epilogue.magnitudes and a in epilogue.angles
)


@dataclass(frozen=True)
class Case:
    """One geometry: x [n, c, h, w], weight [o, c / groups, kernel], in ``nn.Conv2d``'s terms."""

    id: str
    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments of the functional that say where the windows are."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }


CASES = (
    Case("1x1", 2, 17, 5, 6, 8, (1, 1)),
    Case("1x1-s2", 2, 8, 7, 6, 5, (1, 1), stride=2),
    Case("1x1-groups2", 2, 16, 4, 5, 4, (1, 1), groups=2),
    Case("1x1-o515", 1, 17, 3, 3, 515, (1, 1)),
    Case("3x3", 2, 3, 7, 6, 8, (3, 3)),
    Case("3x3-p1", 2, 17, 6, 7, 9, (3, 3), padding=1),
    Case("3x3-p1-c1", 2, 1, 8, 9, 5, (3, 3), padding=1),
    Case("3x3-s2-p1", 2, 4, 8, 7, 6, (3, 3), stride=2, padding=1),
    Case("3x3-s3", 2, 3, 10, 11, 4, (3, 3), stride=3),
    Case("7x7-s2-p3", 2, 3, 13, 12, 8, (7, 7), stride=2, padding=3),
    Case("dilation2", 2, 3, 9, 8, 5, (3, 3), padding=2, dilation=2),
    Case("asymmetric", 2, 3, 9, 6, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    Case("groups3-odd", 2, 6, 6, 5, 9, (3, 3), padding=1, groups=3),
    Case("groups2-s2-dilation2", 2, 8, 9, 9, 6, (2, 3), stride=2, padding=1, dilation=2, groups=2),
    Case("depthwise", 2, 5, 7, 6, 5, (3, 3), padding=1, groups=5),
    Case("depthwise-multiplier3", 2, 3, 6, 6, 9, (3, 3), stride=2, padding=1, groups=3),
    Case("n0", 0, 3, 6, 5, 4, (3, 3), padding=1),
    Case("one-pixel", 1, 3, 3, 3, 7, (3, 3)),
    Case("one-pixel-n3-groups2", 3, 4, 2, 3, 6, (2, 3), groups=2),
    Case("padding-beyond-kernel", 1, 3, 4, 4, 4, (2, 2), padding=3),
    Case("valid", 2, 3, 6, 7, 4, (3, 2), padding="valid"),
    Case("same", 2, 3, 6, 5, 4, (3, 3), padding="same"),
    Case("same-even-kernel", 2, 3, 6, 5, 4, (2, 4), padding="same"),
    Case("same-s2-even", 2, 3, 8, 6, 4, (3, 3), stride=2, padding="same"),
    Case("same-s2-odd", 2, 3, 7, 9, 4, (3, 3), stride=2, padding="same"),
    Case("same-s3-dilation2", 2, 4, 10, 8, 4, (3, 3), 3, "same", 2, groups=2),
    Case("reflect", 2, 3, 6, 7, 5, (3, 3), padding=2, padding_mode="reflect"),
    Case("replicate", 2, 3, 5, 4, 5, (3, 3), (1, 2), (2, 1), padding_mode="replicate"),
    Case("circular", 2, 4, 5, 6, 4, (3, 3), padding=2, groups=2, padding_mode="circular"),
    Case("reflect-same-s2", 2, 3, 8, 8, 4, (3, 3), 2, "same", padding_mode="reflect"),
    Case("replicate-same-s2", 2, 3, 6, 8, 4, (3, 3), 2, "same", padding_mode="replicate"),
    Case("circular-same-s2", 2, 3, 8, 6, 4, (3, 3), 2, "same", padding_mode="circular"),
)


def by_id(name: str) -> Case:
    """Return the case with this id."""
    return next(case for case in CASES if case.id == name)


class Inputs(NamedTuple):
    """One call of the functional: tensor arguments by name, and everything else by name."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]


def _arrange(t: Tensor, layout: str) -> Tensor:
    """Return the same values in a layout (``expanded``: sample 0's values in every sample)."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "sliced":
        n, c, h, w = t.shape
        # NaN around the slice: reading past it shows.
        larger = t.new_full((n + 1, c + 2, h + 2, w + 3), float("nan"))
        view = larger[1:, 1:-1, 1:-1, 2:-1]
        view.copy_(t)
        return view
    return t.contiguous()


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    *,
    magnitude: str = "tanh",
    angular: str = "cosine",
    weighting: str = "none",
    norm: str = "batch",
    bias: bool = False,
    scalar: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Inputs:
    """Build random operands of a case, rounded to the dtype.

    Sample 0 starts with a block of zeros, so that there are zero and partly zero patches. Radii
    stay away from 1: with ``norm="batch"`` and one output position, 1 would be a tie of b and rho.
    Filters have norms around 1 and at least eight elements, so that nothing is saturated or nearly
    aligned: there no float32 formula can be accurate (those points have tests of their own).

    Args:
        case: the geometry.
        dtype: of x, weight and bias; radius, norm_mean and k have its compute dtype.
        layout: one of ``LAYOUTS``, of x; weight follows but for ``expanded``.
        magnitude, angular, weighting: the operator.
        norm: ``batch``, ``given`` or ``none``, for operators with a radius.
        bias: whether to pass a bias.
        scalar: one radius and one k instead of one per filter.
        seed: of the values; they do not depend on dtype, layout and operator.
        options: further arguments of the reference, such as alpha.

    Returns:
        Tensors (those the operator uses) and options.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    r, s = case.kernel
    x = normal(case.n, case.c, case.h, case.w)
    typical = (case.c // case.groups * r * s) ** 0.5
    weight = normal(case.o, case.c // case.groups, r, s) / typical
    offset = normal(case.o)
    count = () if scalar else (case.o,)
    radius = torch.where(uniform(*count) < 0.5, 0.6, 1.1) + 0.3 * uniform(*count)
    curvature = 0.3 + 0.7 * uniform(*count)
    if case.h > r and case.w > s:
        x[:1, :, :r, :s] = 0.0
    if norm == "none":
        radius = radius * typical

    compute = compute_dtype(dtype)
    tensors = {
        "x": _arrange(x.to(device, dtype), layout),
        "weight": _arrange(
            weight.to(device, dtype), "contiguous" if layout == "expanded" else layout
        ),
    }
    if bias:
        tensors["bias"] = offset.to(dtype)
    call: dict[str, Any] = {
        **case.geometry,
        "magnitude": magnitude,
        "angular": angular,
        "weighting": weighting,
        **options,
    }
    if magnitudes[magnitude].uses_rho:
        tensors["radius"] = radius.to(compute)
        if norm == "given":
            tensors["norm_mean"] = torch.tensor(typical, dtype=compute)
        elif norm == "batch":
            call["norm_mean"] = "batch"
    if angulars[angular].uses_k:
        tensors["k"] = curvature.to(compute)
    return Inputs({name: t.to(device) for name, t in tensors.items()}, call)
