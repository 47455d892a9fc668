"""Fakes and FLOP formulas of plan B's ops: each counts as the convolution inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from dcconv.operator.numerics import compute_dtype
from dcconv.passes import guards
from dcconv.passes.fakes import check_sums, layout_of, register


def _filter_norm_fake(weight: Tensor, eps: float) -> Tensor:
    guards.dimensions("weight", weight, 4)
    return weight.new_empty(weight.shape[0], dtype=compute_dtype(weight.dtype))


def _conv2d_one_pass_fake(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    map: Tensor | None,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    power: float,
    delta: float,
    eps: float,
    map_is_norm: bool,
    keep_norm: bool,
    keep_dot: bool,
    kernel: str,
    tile: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    guards.filters_of(x, weight, groups)
    n, _, h, w = x.shape
    window = (weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    p, q = guards.windows(x.shape, weight.shape[0], *window)
    guards.values("a", a, weight.shape[0])
    if map is not None:
        guards.values("map", map, n * groups * (p * q if map_is_norm else h * w))
    shape = (n, weight.shape[0], p, q)
    layout = layout_of(channels_last)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    writes_norm = keep_norm and not map_is_norm
    return (
        y,
        a.new_empty(x.shape[0] * groups * p * q if writes_norm else 0),
        torch.empty_like(y) if keep_dot else x.new_empty(0),
    )


def _conv2d_one_pass_grad_input_fake(
    grad_u: Tensor,
    weight: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    kernel: str,
    tile: int,
    channels_last: bool,
) -> Tensor:
    guards.filters_of(x, weight, groups)
    window = (weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    p, q = guards.windows(x.shape, weight.shape[0], *window)
    guards.shape("grad_u", grad_u, [x.shape[0], weight.shape[0], p, q])
    guards.values("t", t, x.shape[0] * groups * p * q)
    return torch.empty_like(x, memory_format=layout_of(channels_last))


def _depthwise_grad_weight_fake(
    grad_u: Tensor,
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    rows: int,
    weight_channels_last: bool,
    channels_last: bool,
) -> Tensor:
    guards.dimensions("grad_u", grad_u, 4)
    filters = grad_u.shape[1]
    p, q = guards.windows(
        x.shape, filters, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    guards.shape("grad_u", grad_u, [x.shape[0], filters, p, q])
    guards.groups(groups, x.shape[1], x.shape[1])
    if x.shape[1] != groups:
        raise guards.error("groups", f"be the {x.shape[1]} channels of x", groups)
    check_sums(0, rows, filters * kernel_size[0] * kernel_size[1])
    return torch.empty(
        (grad_u.shape[1], 1, *kernel_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout_of(weight_channels_last),
    )


def _forward_flops(
    x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return conv_flop_count(x_shape, w_shape, out_shape[0])


def _grad_input_flops(
    grad_u_shape: Any, w_shape: Any, x_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return conv_flop_count(x_shape, w_shape, grad_u_shape)


def _grad_weight_flops(
    grad_u_shape: Any, x_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return conv_flop_count(x_shape, out_shape, grad_u_shape)


FAKES: dict[str, Callable[..., Any]] = {
    "filter_norm": _filter_norm_fake,
    "conv2d_one_pass": _conv2d_one_pass_fake,
    "conv2d_one_pass_grad_input": _conv2d_one_pass_grad_input_fake,
    "depthwise_grad_weight": _depthwise_grad_weight_fake,
}
FLOPS: dict[str, Callable[..., int]] = {
    "conv2d_one_pass": _forward_flops,
    "conv2d_one_pass_grad_input": _grad_input_flops,
    "depthwise_grad_weight": _grad_weight_flops,
}

register(FAKES, FLOPS)
