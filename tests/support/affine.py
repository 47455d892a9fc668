"""Problems of the op affine_relu, and what every library that has it must give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accuracy import check, same_numbers
from torch import Tensor

from dcconv.operator.numerics import compute_dtype
from dcconv.passes import ops
from dcconv.passes.records import AffineRelu

Function = Callable[[AffineRelu], tuple[Tensor, Tensor]]

#: Sizes of x and groups: vectors of 16 bytes in each dtype; channels and pixels that are none; rows
#: of a few channels and of more than a tile; several tasks; many channels in a sum; nothing.
PROBLEMS: tuple[tuple[tuple[int, int, int, int], int], ...] = (
    ((2, 16, 4, 6), 1),
    ((2, 32, 4, 4), 4),
    ((1, 5, 5, 7), 1),
    ((3, 12, 3, 3), 4),
    ((2, 3, 9, 11), 1),
    ((2, 6, 7, 5), 6),
    ((1, 24, 33, 29), 2),
    ((1, 260, 3, 2), 1),
    ((2, 1200, 2, 1), 3),
    ((5, 8, 1, 1), 8),
    ((0, 4, 3, 3), 2),
    ((2, 4, 0, 3), 1),
)


def op(call: AffineRelu) -> tuple[Tensor, Tensor]:
    """Run the compiled library's op."""
    return ops.affine_relu(call)


def layout_of(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def operands(
    sizes: tuple[int, int, int, int], groups: int, dtype: torch.dtype, last: bool
) -> AffineRelu:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.randn(sizes[1], generator=generator, dtype=torch.float64)
    shift = torch.randn(sizes[1], generator=generator, dtype=torch.float64)
    compute = compute_dtype(dtype)
    x = torch.empty(sizes, dtype=dtype, memory_format=layout_of(last)).copy_(x)
    return AffineRelu(x, scale.to(compute), shift.to(compute), groups, last)


def moved(call: AffineRelu) -> AffineRelu:
    """Return the same values: x one element further on, scale and shift with gaps between."""
    x = call.x
    place = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    place = torch.as_strided(place, x.shape, x.stride(), 1).copy_(x)
    scale, shift = (t.repeat_interleave(2)[::2] for t in (call.scale, call.shift))
    return call._replace(x=place, scale=scale, shift=shift)


def affine_relu(x: Tensor, call: AffineRelu, dtype: torch.dtype) -> Tensor:
    scale, shift = (t.to(dtype)[:, None, None] for t in (call.scale, call.shift))
    return (x.to(dtype) * scale + shift).relu()


def squares(y: Tensor, call: AffineRelu, dtype: torch.dtype) -> Tensor:
    """Return the sums of squares of y, in the order of the op's map."""
    n, c, h, w = y.shape
    sums = y.to(dtype).square().reshape(n, call.groups, c // call.groups, h, w).sum(2)
    return (sums.permute(0, 2, 3, 1) if call.channels_last else sums).reshape(-1)


def check_values(name: str, call: AffineRelu, got: tuple[Tensor, Tensor]) -> None:
    """Hold y to the affine map of x, and the sums to the squares of the y that came out."""
    (y, sums), dtype = got, call.x.dtype
    compute, layout = compute_dtype(dtype), layout_of(call.channels_last)
    assert y.dtype == dtype and sums.dtype == compute and sums.dim() == 1, name
    assert y.stride() == torch.empty(y.shape, memory_format=layout, device="meta").stride(), name
    truth = affine_relu(call.x, call, torch.float64)
    check(f"{name} y", y, truth, affine_relu(call.x, call, compute).to(dtype), dtype)
    check(
        f"{name} sums",
        sums,
        squares(y, call, torch.float64),
        squares(y, call, compute),
        compute,
    )


def check_special_values(function: Function, dtype: torch.dtype, last: bool) -> None:
    """NaN and infinity of x, of the map and of its result: as in relu and square."""
    nan, infinity = float("nan"), float("inf")
    greatest = torch.finfo(dtype).max
    for channels in (4, 8, 5):
        x = torch.ones(2, channels, 3, 4, dtype=dtype)
        places = x.view(2, channels, -1)
        places[0, 1, 0], places[0, 2, 1], places[0, 3, 2] = nan, infinity, -infinity
        places[1, :4, 5] = torch.tensor([0.0, -0.0, greatest, -greatest], dtype=dtype)
        compute = compute_dtype(dtype)
        scale, shift = torch.ones(channels, dtype=compute), torch.zeros(channels, dtype=compute)
        scale[2], shift[3] = 2.0, -1.0
        for name, value in (("none", None), ("scale", nan), ("shift", infinity), ("shift", nan)):
            if value is not None:
                (scale if name == "scale" else shift)[0] = value
            x = torch.empty(x.shape, dtype=dtype, memory_format=layout_of(last)).copy_(x)
            call = AffineRelu(x, scale, shift, 1, last)
            y, sums = function(call)
            want = affine_relu(x, call, compute).to(dtype)
            assert same_numbers(y, want), (name, value)
            assert same_numbers(sums, squares(y, call, compute)), (name, value)


def _call(**changes: object) -> AffineRelu:
    call = operands((2, 6, 3, 4), 2, torch.float32, False)
    return call._replace(**changes)  # type: ignore[arg-type]


_DENSE = r"x must be dense in the layout of the call, {}, got shape \[2, 6, 3, 4\] with strides .*"

#: What is wrong, and the sentence after "dcconv: ".
REFUSALS: dict[str, tuple[Callable[[], AffineRelu], str]] = {
    "three dimensions": (
        lambda: _call(x=torch.zeros(6, 3, 4)),
        r"x must have 4 dimensions, got \[6, 3, 4\]",
    ),
    "no storage dtype": (
        lambda: _call(x=torch.zeros(2, 6, 3, 4, dtype=torch.int32)),
        "a tensor must have dtype float16, bfloat16, float32 or float64, got Int",
    ),
    "other layout": (lambda: _call(channels_last=True), _DENSE.format("channels_last")),
    "gaps": (lambda: _call(x=torch.zeros(2, 6, 3, 8)[..., ::2]), _DENSE.format("contiguous")),
    "groups": (lambda: _call(groups=4), "groups must divide the 6 channels of x, got 4"),
    "no groups": (lambda: _call(groups=0), "groups must divide the 6 channels of x, got 0"),
    "no channels": (
        lambda: _call(x=torch.zeros(2, 0, 3, 4), scale=torch.zeros(0), shift=torch.zeros(0)),
        "groups must divide the 0 channels of x, got 2",
    ),
    "scale's shape": (
        lambda: _call(scale=torch.ones(5)),
        r"scale must have shape \[6\], got \[5\]",
    ),
    "shift's shape": (
        lambda: _call(shift=torch.ones(6, 1)),
        r"shift must have shape \[6\], got \[6, 1\]",
    ),
    "scale's dtype": (
        lambda: _call(scale=torch.ones(6).double()),
        "scale must have dtype float32, got float64",
    ),
    "shift's dtype": (
        lambda: _call(x=torch.zeros(2, 6, 3, 4).half(), shift=torch.ones(6).half()),
        "shift must have dtype float32, got float16",
    ),
    "too many elements": (
        lambda: _call(x=torch.zeros(0).as_strided((0, 6, 2**40, 2**20), (0, 0, 0, 0))),
        r"x must have at most 2\^50 elements, got \[0, 6, 1099511627776, 1048576\]",
    ),
}

#: Refusals of the ops alone: fakes leave strides, and dtypes that no kernel has, to them.
NOT_OF_FAKES = ("no storage dtype", "other layout", "gaps")


def refused(name: str) -> tuple[AffineRelu, str]:
    make, words = REFUSALS[name]
    return make(), words
