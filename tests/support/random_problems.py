"""Random calls of the operator: geometry, groups, layouts, operators, constants, few channels.

A problem is drawn from its number alone: the same everywhere, on every version of PyTorch, whatever
else is drawn. Many have few products per sum, since that is where rounding is not averaged out; and
some have operands that are constant or broadcast, where roundings are all alike.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from cases import Inputs
from torch import Tensor

from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.numerics import compute_dtype

#: How values are spread over an operand.
VALUES = ("normal", "normal", "normal", "constant", "per_channel", "few")

#: How an operand lies in memory; ``broadcast`` has strides of 0 as far as its values allow.
STORAGES = ("contiguous", "channels_last", "broadcast", "sliced")

# Lists of their own: a problem stays what it is when functions are added.
_MAGNITUDES = ("sphere", "ball", "tanh", "linear", "segmented", "log", "mix")
WEIGHTED_MAGNITUDES = (
    *((name, "none") for name in _MAGNITUDES),
    *((name, "linear") for name in _MAGNITUDES),
    ("tanh", "product"),
    ("tanh", "separate"),
)
ANGULARS = ("linear", "cosine", "sigmoid", "square_cosine", "power")

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


#: Found among 1,500: groups of few products whose cosine is 1 up to rounding; float64 gradients of
#: radius and norm_mean of a saturated tanh; the same in float32 and 16 bits.
ALIGNED = (466, 651, 766, 807, 908, 936, 1006, 1101, 1170, 1214, 1286, 1320, 1373, 1467, 1484)
SATURATED = (131, 497, 516, 564, 902, 1259, 1378)


class RandomProblem(NamedTuple):
    """A call and what to say of it where it fails."""

    name: str
    dtype: torch.dtype
    inputs: Inputs


def _values(draw: random.Random, kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return float64 values; constant ones are expanded."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "constant":
        number = draw.choice((0.3, 0.7, 1.0, 1.7)) * draw.choice((-1, 1))
        return torch.tensor(number, dtype=torch.float64).expand(shape)
    if kind == "per_channel":
        channel = torch.randn(1, shape[1], 1, 1, generator=generator, dtype=torch.float64)
        return channel.expand(shape)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "few":
        # A few values, zero among them: ties, and sums of equal terms.
        return (normal * 1.5).round() / 2
    return normal


def _stored(values: Tensor, storage: str, dtype: torch.dtype) -> Tensor:
    """Return the values, rounded to a dtype, as they lie in memory."""
    if storage == "broadcast":
        once = values
        for dim in range(4):
            if values.stride(dim) == 0:
                once = once.narrow(dim, 0, min(1, values.shape[dim]))
        return once.to(dtype).contiguous().expand(values.shape)
    values = values.to(dtype)
    if storage == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if storage == "sliced":
        n, c, h, w = values.shape
        view = values.new_full((n, c + 1, h + 1, w + 2), float("nan"))[:, 1:, :-1, 1:-1]
        view.copy_(values)
        return view
    return values.contiguous()


def problem(
    number: int,
    dtype: torch.dtype | None = None,
    largest: int = 9,
) -> RandomProblem:
    """Draw a problem.

    Args:
        number: of the problem, its seed.
        dtype: of x and the weight; None draws one.
        largest: most rows and columns of an image.
    """
    draw = random.Random(number)
    dtype = dtype or draw.choice(DTYPES)
    compute = compute_dtype(dtype)
    groups = draw.choice((1, 1, 1, 2, 3, 5))
    channels = draw.choice((1, 1, 1, 2, 3, 8, 17))
    filters = draw.choice((1, 1, 2, 3, 16))
    kernel = draw.choice(((1, 1), (1, 1), (1, 1), (3, 3), (2, 3), (1, 2), (5, 5)))
    stride = draw.choice((1, 1, 1, 2, (2, 1)))
    dilation = draw.choice((1, 1, 1, 2, (1, 2)))
    padding: Any = draw.choice((0, 0, 1, (1, 0), "same"))
    if max(kernel) == 1 and padding != "same":
        padding = 0
    mode = draw.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
    size = [draw.randint(2 * k + 1, max(largest, 2 * k + 1)) for k in kernel]
    n = draw.choice((1, 1, 2, 3))

    kinds = [draw.choice(VALUES), draw.choice(VALUES)]
    storages = [draw.choice(STORAGES), draw.choice(STORAGES)]
    scales = [10.0 ** draw.uniform(-1.0, 1.0), 10.0 ** draw.uniform(-1.0, 1.0)]
    shapes = [(n, groups * channels, *size), (groups * filters, channels, *kernel)]
    x, weight = (
        _stored(_values(draw, kind, shape, 2 * number + i) * scale, storage, dtype)
        for i, (kind, shape, scale, storage) in enumerate(
            zip(kinds, shapes, scales, storages, strict=True)
        )
    )
    magnitude, weighting = draw.choice(WEIGHTED_MAGNITUDES)
    angular = draw.choice(ANGULARS)
    generator = torch.Generator().manual_seed(number)
    count = () if draw.random() < 0.3 else (groups * filters,)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    typical = scales[0] * (channels * kernel[0] * kernel[1]) ** 0.5
    tensors = {"x": x, "weight": weight}
    options: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
        "magnitude": magnitude,
        "angular": angular,
        "weighting": weighting,
        "alpha": draw.choice((1.0, 1.0, 0.5, 3.0)),
        "beta": draw.choice((0.5, 0.25)),
        "power": draw.choice((1.0, 1.5, 2.0, 3.0)),
    }
    if draw.random() < 0.2:
        tensors["bias"] = torch.randn(groups * filters, generator=generator).to(dtype)
    norm = "no rho"
    if magnitudes[magnitude].uses_rho:
        norm = draw.choice(("batch", "given", "none"))
        # Between saturated and linear.
        radius = 10.0 ** (uniform() - 0.5)
        tensors["radius"] = (radius * (typical if norm == "none" else 1.0)).to(compute)
        if norm == "given":
            tensors["norm_mean"] = torch.tensor(typical, dtype=compute)
        elif norm == "batch":
            options["norm_mean"] = "batch"
    if angulars[angular].uses_k:
        tensors["k"] = (0.1 + uniform()).to(compute)
    text = (
        f"{number}: {str(dtype).removeprefix('torch.')} x {kinds[0]} {storages[0]} {shapes[0]} "
        f"w {kinds[1]} {storages[1]} {shapes[1]} scales {scales[0]:.2g} {scales[1]:.2g} "
        f"groups {groups} stride {stride} padding {padding} {mode} dilation {dilation} "
        f"{magnitude} {weighting} {angular} {norm}"
    )
    return RandomProblem(text, dtype, Inputs(tensors, options))
