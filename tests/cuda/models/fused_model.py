"""A readable model of the fused ops, in float64, rounded once: what the kernels promise to compute.

Schemas stand in ``csrc/schemas.h``; the passes that fused shares with library in ``library_model``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from library_model import (
    Sizes,
    conv2d_epilogue,
    conv2d_grad_input,
    flat_map,
    layout_of,
    need_dense,
    pad_all,
    pixel_squares,
    stored,
)
from library_model import filter_norm as norms_of_filters
from torch import Tensor

from dcconv.operator.numerics import compute_dtype


def need_kernel(kernel: str, x: Tensor, weight: Tensor, groups: int, last: bool) -> None:
    """Hold callers to what the kernel is made for."""
    filters, channels = weight.shape[0] // groups, weight.shape[1]
    if kernel == "implicit_gemm":
        assert last and x.dtype in (torch.bfloat16, torch.float16)
        assert channels % 8 == filters % 8 == 0
    elif kernel == "depthwise":
        assert channels < 8 and 1 < groups == x.shape[1] // channels
    else:
        assert kernel == "stem" and groups == 1 and channels <= 4


def filter_norm(weight: Tensor, eps: float) -> Tensor:
    need_dense(layout_of(weight.is_contiguous(memory_format=torch.channels_last)), weight)
    return norms_of_filters(weight, eps).to(compute_dtype(weight.dtype))


def conv2d_one_pass(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    map: Tensor | None,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
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
    layout = layout_of(channels_last)
    need_dense(layout, x, weight)
    need_kernel(kernel, x, weight, groups, channels_last)
    assert padding_mode == "zeros" and tile == -1
    kernel_size = list(weight.shape[2:])
    assert map is None or map_is_norm or kernel == "implicit_gemm"
    if map is None:
        assert kernel != "implicit_gemm" or (kernel_size == [1, 1] and not any(padding))
        map = flat_map(pixel_squares(x, groups), channels_last)
    padded = pad_all(x.double(), padding, "zeros")
    u = F.conv2d(padded, weight.double(), None, stride, 0, dilation, groups)
    y, norm_map = conv2d_epilogue(
        stored(u, torch.float64, layout),
        a,
        map,
        bias,
        radius,
        mean,
        k,
        list(x.shape[2:]),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        magnitude,
        angular,
        weighting,
        alpha,
        beta,
        power,
        delta,
        eps,
        map_is_norm,
        channels_last,
    )
    return (
        stored(y, x.dtype, layout),
        norm_map if keep_norm else a.new_empty(0),
        stored(u, x.dtype, layout) if keep_dot else x.new_empty(0),
    )


def conv2d_one_pass_grad_input(
    grad_u: Tensor,
    weight: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    kernel: str,
    tile: int,
    channels_last: bool,
) -> Tensor:
    layout = layout_of(channels_last)
    need_dense(layout, grad_u, weight, x)
    need_kernel(kernel, x, weight, groups, channels_last)
    assert kernel == "depthwise" or (kernel == "implicit_gemm" and list(stride) == [1, 1])
    assert padding_mode == "zeros" and tile == -1
    n, c, h, w = x.shape
    top, bottom, left, right = padding
    padded = torch.nn.grad.conv2d_input(
        (n, c, h + top + bottom, w + left + right),
        weight.double(),
        grad_u.double(),
        stride,
        0,
        dilation,
        groups,
    )
    return conv2d_grad_input(
        stored(padded, torch.float64, layout),
        x,
        t,
        norm_map,
        sigma,
        list(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        True,
        channels_last,
    )


def depthwise_grad_weight(
    grad_u: Tensor,
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    rows: int,
    weight_channels_last: bool,
    channels_last: bool,
) -> Tensor:
    need_dense(layout_of(channels_last), grad_u, x)
    assert padding_mode == "zeros" and rows >= 1
    filters = grad_u.shape[1]
    shape = (filters, x.shape[1] // groups, *kernel_size)
    need_kernel("depthwise", x, torch.empty(shape), groups, channels_last)
    assert groups == x.shape[1]
    padded = pad_all(x.double(), padding, "zeros")
    grad = torch.nn.grad.conv2d_weight(padded, shape, grad_u.double(), stride, 0, dilation, groups)
    return stored(grad, x.dtype, layout_of(weight_channels_last))


implementations = {
    function.__name__: function
    for function in (
        filter_norm,
        conv2d_one_pass,
        conv2d_one_pass_grad_input,
        depthwise_grad_weight,
    )
}
