"""Operands as kernels take them: layouts, sizes of windows, and which parameters there are."""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv.operator.functions import magnitudes, weightings
from dcconv.operator.layout import is_channels_last
from dcconv.operator.numerics import tf32_convolutions


def layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def format_of(t: Tensor) -> bool:
    return t.shape[0] > 0 and is_channels_last(t)


def empty_like(t: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(t, memory_format=layout(channels_last))


def slots(padding: list[int], padding_mode: str) -> tuple[int, int]:
    """Return how many padded rows, and columns, show a row or column at most."""
    top, bottom, left, right = padding
    if padding_mode == "zeros":
        return 1, 1
    if padding_mode == "replicate":
        return 1 + top + bottom, 1 + left + right
    return 3, 3


def number_of(parameter: Tensor | None) -> str:
    """Return whether there is one value, one per filter or none."""
    if parameter is None:
        return "none"
    return "filter" if parameter.dim() else "one"


def dense(parameter: Tensor | None, otherwise: Tensor) -> Tensor:
    """Return a parameter without gaps; kernels do not read ``otherwise``."""
    return otherwise if parameter is None else parameter.contiguous()


def per_position(magnitude: str, weighting: str, radius: Tensor | None) -> bool:
    """Whether h depends on the position alone, up to a factor a."""
    if weightings[weighting].only_with is not None:
        return False
    return not magnitudes[magnitude].uses_rho or number_of(radius) != "filter"


def precision(x: Tensor) -> str:
    """Return the precision of float32 products, for ``tl.dot``: that of PyTorch's convolutions."""
    rounded = x.dtype == torch.float32 and x.is_cuda and tf32_convolutions()
    return "tf32" if rounded else "ieee"
