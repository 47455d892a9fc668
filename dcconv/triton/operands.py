"""Operands as kernels take them: layouts, sizes of windows, and which parameters there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcconv.operator.functions import magnitudes, weightings
from dcconv.operator.layout import is_channels_last
from dcconv.operator.numerics import tf32_convolutions
from dcconv.operator.records import Window
from dcconv.passes.records import Functions, Pair, Parameters
from dcconv.triton.environment import twin_of


def format_of(t: Tensor) -> bool:
    return t.shape[0] > 0 and is_channels_last(t)


def slots(window: Window) -> tuple[int, int]:
    """Return how many padded rows, and columns, show a row or column at most."""
    top, bottom, left, right = window.padding
    if window.padding_mode == "zeros":
        return 1, 1
    if window.padding_mode == "replicate":
        return 1 + top + bottom, 1 + left + right
    return 3, 3


def steps(window: Window) -> tuple[int, ...]:
    """Return a kernel's arguments ``stride_rows`` to ``dilation_columns``."""
    top, _, left, _ = window.padding
    return *window.stride, top, left, *window.dilation


def edges(window: Window) -> tuple[int, ...]:
    """Return the same of a kernel that asks for all four paddings."""
    return *window.stride, *window.padding, *window.dilation


def window_constants(kernel_size: Pair, window: Window) -> dict[str, Any]:
    """Return a kernel's constants of windows."""
    return {"ROWS": kernel_size[0], "COLUMNS": kernel_size[1], "MODE": window.padding_mode}


def number_of(parameter: Tensor | None) -> str:
    """Return whether there is one value, one per filter or none."""
    if parameter is None:
        return "none"
    return "filter" if parameter.dim() else "one"


def dense(parameter: Tensor | None, otherwise: Tensor) -> Tensor:
    """Return a parameter without gaps; kernels do not read ``otherwise``."""
    return otherwise if parameter is None else parameter.contiguous()


def dense_parameters(parameters: Parameters, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel's arguments ``radius``, ``mean`` and ``k``."""
    radius, mean, k = parameters
    return dense(radius, a), dense(mean, a), dense(k, a)


def function_constants(functions: Functions, parameters: Parameters) -> dict[str, Any]:
    """Return a kernel's constants of h and g.

    PER_POSITION: whether h depends on the position alone, up to a factor a.
    """
    magnitude, angular, weighting = functions[:3]
    radius, mean, k = map(number_of, parameters)
    apart = weightings[weighting].only_with is None
    return {
        "MAGNITUDE": twin_of(magnitude, weighting),
        "ANGULAR": angular,
        "TIMES_A": weighting == "linear",
        "PER_POSITION": apart and (not magnitudes[magnitude].uses_rho or radius != "filter"),
        "RADIUS": radius,
        "HAS_MEAN": mean != "none",
        "CURVATURE": k,
    }


def precision(x: Tensor) -> str:
    """Return the precision of float32 products, for ``tl.dot``: that of PyTorch's convolutions."""
    rounded = x.dtype == torch.float32 and x.is_cuda and tf32_convolutions()
    return "tf32" if rounded else "ieee"
