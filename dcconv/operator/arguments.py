"""A call's tensors, checked against each other and its records; its operands and its problem.

Values are checked for Python numbers only: reading a tensor's value would synchronise the device.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from dcconv.operator import records
from dcconv.operator.checks import dense, is_number, pair, type_error, value_error
from dcconv.operator.convolution import batched, fitted
from dcconv.operator.numerics import FLOATING_DTYPES, MOST_PIXELS, angle_delta
from dcconv.warn import warn_once

# Padding from which the pixels of the output are counted, and how many there may be.
LARGEST_PADDING, LARGEST_OUTPUT = 2**16, 2**40


def input_tensor(x: object) -> None:
    """Require a floating [n, c, h, w] or [c, h, w] tensor."""
    if not isinstance(x, Tensor):
        raise type_error("x", "be a tensor", type(x).__name__)
    dense("x", x)
    if x.dim() not in (3, 4):
        raise value_error("x", "have shape [n, c, h, w] or [c, h, w]", list(x.shape))
    if x.dtype not in FLOATING_DTYPES:
        raise type_error("x", "have dtype float16, bfloat16, float32 or float64", x.dtype)
    if x.shape[-3] == 0:
        raise value_error("x", "have at least one channel", list(x.shape))


def same_device(argument: str, value: Tensor, x: Tensor) -> None:
    """Require a tensor on x's device."""
    if value.device != x.device:
        raise value_error(argument, f"be on x's device {x.device}", value.device)


def weight_tensor(weight: object, x: Tensor, groups: int) -> None:
    """Require a [o, c / groups, r, s] filter tensor that fits x."""
    if not isinstance(weight, Tensor):
        raise type_error("weight", "be a tensor", type(weight).__name__)
    dense("weight", weight)
    if weight.dim() != 4:
        raise value_error("weight", "have shape [o, c / groups, r, s]", list(weight.shape))
    if weight.dtype != x.dtype:
        raise type_error("weight", f"have x's dtype {x.dtype}", weight.dtype)
    same_device("weight", weight, x)
    if weight.shape[0] == 0:
        raise value_error("weight", "have at least one filter", list(weight.shape))
    channels, wanted = x.shape[-3], weight.shape[1] * groups
    if channels != wanted and x.shape[-1] == wanted:
        order = "(0, 3, 1, 2)" if x.dim() == 4 else "(2, 0, 1)"
        rule = f"have its {wanted} channels before rows and columns, as x.permute{order} has them"
        raise value_error("x", rule, list(x.shape))
    if channels % groups:
        raise value_error("groups", f"divide the {channels} channels of x", groups)
    if weight.shape[0] % groups:
        raise value_error("groups", f"divide the {weight.shape[0]} filters of weight", groups)
    if weight.shape[1] != channels // groups:
        raise value_error(
            "weight.size(1)", f"be in_channels / groups = {channels // groups}", weight.shape[1]
        )
    if weight.shape[2] == 0 or weight.shape[3] == 0:
        raise value_error("weight", "have at least one row and column", list(weight.shape))


def bias_tensor(bias: object, x: Tensor, filters: int) -> None:
    """Require None or a [o] tensor of x's dtype."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise type_error("bias", "be a tensor or None", type(bias).__name__)
    dense("bias", bias)
    if bias.dim() != 1 or bias.shape[0] != filters:
        raise value_error("bias", f"have shape [{filters}]", list(bias.shape))
    if bias.dtype != x.dtype:
        raise type_error("bias", f"have x's dtype {x.dtype}", bias.dtype)
    same_device("bias", bias, x)


def parameter(argument: str, value: object, x: Tensor, filters: int) -> Tensor | float:
    """Return a number above 0, as a plain one, or a floating tensor of shape [] or [o]."""
    rule = f"be a number above 0 or a floating tensor of shape [] or [{filters}]"
    if isinstance(value, Tensor):
        dense(argument, value)
        if value.dtype not in FLOATING_DTYPES:
            raise type_error(argument, rule, value.dtype)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != filters):
            raise value_error(argument, rule, f"shape {list(value.shape)}")
        same_device(argument, value, x)
        return value
    if not is_number(value):
        raise type_error(argument, rule, type(value).__name__)
    if not 0 < value < (sys.float_info.max if isinstance(value, int) else math.inf):
        raise value_error(argument, rule, value)
    # PyTorch takes no numbers but these; a compiler's symbols stay what they are.
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def norm_mean_argument(norm_mean: object, x: Tensor) -> str:
    """Return the norm mode of a ``norm_mean`` argument."""
    rule = "be None, 'batch' or a floating tensor of shape []"
    if norm_mean is None:
        return records.NORM_NONE
    if isinstance(norm_mean, str):
        if norm_mean != records.NORM_BATCH:
            raise value_error("norm_mean", rule, repr(norm_mean))
        return records.NORM_BATCH
    if not isinstance(norm_mean, Tensor) or norm_mean.dtype not in FLOATING_DTYPES:
        got = norm_mean.dtype if isinstance(norm_mean, Tensor) else type(norm_mean).__name__
        raise type_error("norm_mean", rule, got)
    dense("norm_mean", norm_mean)
    if norm_mean.dim() != 0:
        raise value_error("norm_mean", rule, f"shape {list(norm_mean.shape)}")
    same_device("norm_mean", norm_mean, x)
    return records.NORM_GIVEN


def window_of(x: Tensor, kernel: tuple[int, int], geometry: records.Geometry) -> records.Window:
    """Return where windows lie in x; a geometry that does not fit x is refused."""
    stride, padding, dilation, _, padding_mode = geometry
    h: Any = x.shape[-2]
    w: Any = x.shape[-1]
    if isinstance(h, Tensor):  # recorded by torch.jit.trace
        h, w = int(h), int(w)
        kernel = int(kernel[0]), int(kernel[1])
        if padding == "same" and max(stride) > 1:
            warn_once(
                f"torch.jit.trace records padding='same' at stride {list(stride)} for images of "
                f"{h} x {w}: others may need another padding"
            )
    if padding == "same":
        edges: tuple[int, int, int, int] = (
            *records.same_padding(h, kernel[0], stride[0], dilation[0]),
            *records.same_padding(w, kernel[1], stride[1], dilation[1]),
        )
    elif padding == "valid":
        edges = (0, 0, 0, 0)
    else:
        assert not isinstance(padding, str)
        edges = (padding[0], padding[0], padding[1], padding[1])
    # The padding at the end is never the smaller one.
    for size, largest, axis in ((h, edges[1], "height"), (w, edges[3], "width")):
        # Asked of numbers alone, as of all sizes: others are symbols of a compiler.
        if isinstance(largest, int) and largest > MOST_PIXELS:
            raise value_error("padding", f"be at most {MOST_PIXELS} pixels for 'same'", largest)
        if padding_mode == "reflect" and largest and largest >= size:
            raise value_error("padding", f"be below the {axis} {size} for 'reflect'", largest)
        if padding_mode == "circular" and largest > size:
            raise value_error("padding", f"be at most the {axis} {size} for 'circular'", largest)
        if padding_mode == "replicate" and largest and size == 0:
            raise value_error("x", f"have a {axis} of at least 1 for 'replicate'", size)
    p = records.output_size(h, kernel[0], stride[0], edges[0], edges[1], dilation[0])
    q = records.output_size(w, kernel[1], stride[1], edges[2], edges[3], dilation[1])
    # With 'same' there is a window for every stride.
    if padding != "same" and (p < 1 or q < 1):
        extent = [dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1]
        padded = [h + edges[0] + edges[1], w + edges[2] + edges[3]]
        raise value_error(
            "x", f"be at least as large as the dilated kernel {extent} after padding", padded
        )
    for largest in (edges[1], edges[3]):
        if isinstance(largest, int) and largest > LARGEST_PADDING and p * q > LARGEST_OUTPUT:
            raise value_error("padding", f"leave at most {LARGEST_OUTPUT} pixels", [p, q])
    if h == 0 or w == 0:
        raise value_error("x", "have a height and width of at least 1", [h, w])
    return records.Window(stride, edges, dilation, geometry.groups, padding_mode)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: Tensor | float,
    norm_mean: Tensor | str | None,
    k: Tensor | float,
    operator: records.Operator,
    geometry: records.Geometry,
    norm_grad: bool = True,
) -> tuple[records.Operands, records.Problem]:
    """Check a decoupled convolution call and return its operands, x batched, and its problem."""
    input_tensor(x)
    weight_tensor(weight, x, geometry.groups)
    filters = weight.shape[0]
    bias_tensor(bias, x, filters)
    radius = parameter("radius", radius, x, filters)
    k = parameter("k", k, x, filters)
    norm = norm_mean_argument(norm_mean, x)
    window = window_of(x, (weight.shape[2], weight.shape[3]), geometry)
    uses_rho = operator.uses_rho
    mean = norm_mean if isinstance(norm_mean, Tensor) and uses_rho else None
    operands = records.Operands(
        x=batched(x),
        weight=fitted(weight),
        bias=bias,
        radius=records.as_compute(radius, x) if uses_rho else None,
        norm_mean=records.as_compute(mean, x),
        k=records.as_compute(k, x) if operator.uses_k else None,
    )
    norm = norm if uses_rho else records.NORM_NONE
    return operands, records.Problem(operator, window, norm, norm_grad, angle_delta(x))


def patch_norm(
    x: Tensor, kernel_size: Any, geometry: records.Geometry, eps: float
) -> tuple[Tensor, tuple[int, int], records.Problem]:
    """Check a patch norm call and return x batched, the kernel size and the problem."""
    operator = records.Operator(eps=eps)
    input_tensor(x)
    kernel = pair("kernel_size", kernel_size, 1)
    channels, groups = x.shape[-3], geometry.groups
    if channels % groups:
        raise value_error("groups", f"divide the {channels} channels of x", groups)
    return batched(x), kernel, records.Problem(operator, window_of(x, kernel, geometry))
