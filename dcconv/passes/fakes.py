"""Fakes and FLOP formulas of the ops: what tracing and counting need to know of each result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from dcconv import native
from dcconv.native import NEEDS_BIAS, NEEDS_K, NEEDS_NORM_MEAN, NEEDS_RADIUS, NEEDS_WEIGHT, NEEDS_X
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, is_norm_free
from dcconv.passes import guards
from dcconv.passes.library import SUM_A, SUM_BIAS, SUM_K, SUM_RHO


def layout_of(channels_last: bool) -> torch.memory_format:
    """Return the memory format that an op's argument names."""
    return torch.channels_last if channels_last else torch.contiguous_format


def check_sums(sums: int, rows: int, filters: int) -> None:
    """Require bits of known sums, and a number of partial sums that there is room for."""
    every = SUM_RHO | SUM_A | SUM_K | SUM_BIAS
    if not 0 <= sums <= every:
        raise guards.error("sums", f"be bits of {every}", sums)
    guards.bounded("rows", rows, 1)
    guards.countable("parts", [4, rows, filters])


def check_epilogue(
    u: Tensor,
    a: Tensor,
    map: Tensor,
    input_size: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    map_is_norm: bool,
) -> None:
    """Require that the sizes of the epilogue's operands fit together."""
    guards.dimensions("u", u, 4)
    guards.numbers("input_size", input_size, 2)
    n, filters = u.shape[:2]
    window = (kernel_size, stride, padding, dilation, groups, padding_mode)
    p, q = guards.windows([n, groups, *input_size], filters, *window)
    guards.shape("u", u, [n, filters, p, q])
    height, width = (p, q) if map_is_norm else input_size
    guards.values("map", map, n * groups * height * width)
    guards.values("a", a, filters)


def check_grad_dot(
    grad_y: Tensor, kept: Tensor, norm_map: Tensor, a: Tensor, groups: int, sums: int, rows: int
) -> None:
    """Require that the sizes of the operands of the pass over dy fit together."""
    guards.dimensions("grad_y", grad_y, 4)
    n, filters, p, q = grad_y.shape
    guards.groups(groups, filters, filters)
    guards.shape("kept", kept, [n, filters, p, q])
    guards.values("norm_map", norm_map, n * groups * p * q)
    guards.values("a", a, filters)
    check_sums(sums, rows, filters)


def check_grad_filters(
    parts: Tensor, library_grad: Tensor | None, weight: Tensor, a: Tensor, sums: int
) -> None:
    """Require that the sizes of the operands of the filter side fit together."""
    guards.dimensions("weight", weight, 4)
    filters = weight.shape[0]
    check_sums(sums, 1, filters)
    guards.values("a", a, filters)
    if sums:
        guards.dimensions("parts", parts, 3)
        guards.shape("parts", parts, [bin(sums).count("1"), parts.shape[1], filters])
    if library_grad is not None:
        guards.shape("library_grad", library_grad, weight.shape)


def check_grad_input(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    padded: bool,
) -> None:
    """Require that the sizes of the operands of the pass that finishes grad_x fit together."""
    window = (kernel_size, stride, padding, dilation, groups, padding_mode)
    p, q = guards.windows(x.shape, groups, *window)
    n, c, height, width = x.shape
    guards.values("t", t, n * groups * p * q)
    if padded:
        height, width = height + padding[0] + padding[1], width + padding[2] + padding[3]
    guards.shape("library_grad", library_grad, [n, c, height, width])


def check_window_grad(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> None:
    """Require that the sizes of the operands of the norm's gradient fit together."""
    window = (kernel_size, stride, padding, dilation, groups, padding_mode)
    p, q = guards.windows(x.shape, groups, *window)
    for name, t in (("b", b), ("grad_b", grad_b)):
        guards.shape(name, t, [x.shape[0], groups, p, q])


def _conv2d_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    norm_mean: Tensor | None,
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
    eps: float,
    delta: float,
    norm: str,
    keep_dot: bool,
    keep_map: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    guards.filters_of(x, weight, groups)
    kernel = (weight.shape[2], weight.shape[3])
    p, q = guards.windows(
        x.shape, weight.shape[0], kernel, stride, padding, dilation, groups, padding_mode
    )
    shape = (x.shape[0], weight.shape[0], p, q)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))
    compute = compute_dtype(x.dtype)
    norm_free = is_norm_free(magnitude, angular, weighting)
    count = 0 if norm_free or not keep_map else x.shape[0] * groups * p * q
    norm_map = x.new_empty(count, dtype=compute)
    mean = x.new_empty(() if norm == NORM_BATCH else (0,), dtype=compute)
    dot = torch.empty_like(y) if keep_dot and not norm_free else x.new_empty(0)
    return y, norm_map, mean, dot


def _parameter_grads(
    weight: Tensor,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    compute: torch.dtype,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of weight, bias, radius, mean norm and k; [0] for the unwanted."""

    def like(t: Tensor | None, bit: int) -> Tensor:
        if t is None or not needs & bit:
            return weight.new_empty(0, dtype=compute)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if needs & NEEDS_WEIGHT:
        grad_weight = torch.empty_like(weight, memory_format=memory_format(weight))
    if needs & NEEDS_BIAS:
        grad_bias = weight.new_empty(weight.shape[0])
    return (
        grad_weight,
        grad_bias,
        like(radius, NEEDS_RADIUS),
        like(mean, NEEDS_NORM_MEAN),
        like(k, NEEDS_K),
    )


def _conv2d_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    norm_map: Tensor,
    mean: Tensor,
    radius: Tensor | None,
    norm_mean: Tensor | None,
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
    eps: float,
    delta: float,
    norm: str,
    norm_grad: bool,
    kept_is: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    guards.filters_of(x, weight, groups)
    kernel = (weight.shape[2], weight.shape[3])
    p, q = guards.windows(
        x.shape, weight.shape[0], kernel, stride, padding, dilation, groups, padding_mode
    )
    guards.shape("grad_y", grad_y, [x.shape[0], weight.shape[0], p, q])
    layout = memory_format(x, weight)
    grad_x = torch.empty_like(x, memory_format=layout) if needs & NEEDS_X else x.new_empty(0)
    compute = compute_dtype(x.dtype)
    return grad_x, *_parameter_grads(weight, radius, norm_mean, k, compute, needs)


def _patch_norm_forward_fake(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    eps: float,
) -> Tensor:
    p, q = guards.windows(
        x.shape, groups, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    return torch.empty(
        (x.shape[0], groups, p, q),
        dtype=compute_dtype(x.dtype),
        device=x.device,
        memory_format=memory_format(x),
    )


def _patch_norm_backward_fake(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> Tensor:
    check_window_grad(grad_b, x, b, kernel_size, stride, padding, dilation, groups, padding_mode)
    return torch.empty_like(x, memory_format=memory_format(x))


def _conv2d_norms_fake(
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    eps: float,
    batch_mean: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    guards.filters_of(x, weight, groups)
    kernel = (weight.shape[2], weight.shape[3])
    p, q = guards.windows(
        x.shape, weight.shape[0], kernel, stride, padding, dilation, groups, padding_mode
    )
    if not batch_mean:
        p, q = x.shape[2], x.shape[3]
    return (
        x.new_empty(weight.shape[0], dtype=compute),
        x.new_empty(x.shape[0] * groups * p * q, dtype=compute),
        x.new_empty(() if batch_mean else (0,), dtype=compute),
    )


def _norm_map_of(u: Tensor, a: Tensor, groups: int, map_is_norm: bool) -> Tensor:
    count = 0 if map_is_norm else u.shape[0] * groups * u.shape[2] * u.shape[3]
    return a.new_empty(count)


def _conv2d_epilogue_fake(
    u: Tensor,
    a: Tensor,
    map: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    input_size: Any,
    kernel_size: Any,
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
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    check_epilogue(
        u,
        a,
        map,
        input_size,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        map_is_norm,
    )
    y = torch.empty_like(u, memory_format=layout_of(channels_last))
    return y, _norm_map_of(u, a, groups, map_is_norm)


def _conv2d_epilogue_inplace_fake(u: Tensor, a: Tensor, *arguments: Any) -> Tensor:
    return _conv2d_epilogue_fake(u, a, *arguments)[1]


def _conv2d_grad_dot_fake(
    grad_y: Tensor,
    kept: Tensor,
    norm_map: Tensor,
    a: Tensor,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    groups: int,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    power: float,
    delta: float,
    kept_is: str,
    wants_t: bool,
    sums: int,
    rows: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_grad_dot(grad_y, kept, norm_map, a, groups, sums, rows)
    kinds = bin(sums).count("1")
    return (
        torch.empty_like(grad_y, memory_format=layout_of(channels_last)),
        torch.empty_like(norm_map) if wants_t else a.new_empty(0),
        a.new_empty((kinds, rows, a.shape[0]) if kinds else 0),
    )


def _conv2d_grad_filters_fake(
    parts: Tensor,
    library_grad: Tensor | None,
    weight: Tensor,
    a: Tensor,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    map_count: int,
    sums: int,
    barrier: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_grad_filters(parts, library_grad, weight, a, sums)
    return (
        *_parameter_grads(weight, radius, mean, k, a.dtype, needs),
        a.new_empty(() if barrier else (0,)),
    )


def _conv2d_grad_input_fake(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    padded: bool,
    channels_last: bool,
) -> Tensor:
    check_grad_input(
        library_grad, x, t, kernel_size, stride, padding, dilation, groups, padding_mode, padded
    )
    return torch.empty_like(x, memory_format=layout_of(channels_last))


def _conv2d_grad_input_inplace_fake(library_grad: Tensor, *arguments: Any) -> None:
    _conv2d_grad_input_fake(*(library_grad, *arguments[:-1], False, arguments[-1]))


def _filter_scale_fake(
    weight: Tensor, alpha: float, eps: float, divide: bool
) -> tuple[Tensor, Tensor]:
    guards.dimensions("weight", weight, 4)
    a = weight.new_empty(weight.shape[0], dtype=compute_dtype(weight.dtype))
    return torch.empty_like(weight, memory_format=memory_format(weight)), a


def _filter_scale_grad_fake(
    library_grad: Tensor, weight: Tensor, a: Tensor, alpha: float, divide: bool
) -> Tensor:
    guards.dimensions("weight", weight, 4)
    guards.shape("library_grad", library_grad, weight.shape)
    return torch.empty_like(weight, memory_format=memory_format(weight))


def _conv2d_forward_flops(
    x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the library convolution only, as PyTorch does for fused attention and convolution."""
    return conv_flop_count(x_shape, w_shape, out_shape[0])


def _conv2d_backward_flops(
    grad_y_shape: Any, x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the convolution once for each of grad_x and grad_weight that is computed."""
    wanted = sum(1 for shape in out_shape[:2] if len(shape) == 4)
    return wanted * conv_flop_count(x_shape, w_shape, grad_y_shape)


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Passes are not matrix work; PyTorch's counter leaves elementwise work out as well."""
    return 0


_FAKES: dict[str, Callable[..., Any]] = {
    "conv2d_forward": _conv2d_forward_fake,
    "conv2d_backward": _conv2d_backward_fake,
    "patch_norm_forward": _patch_norm_forward_fake,
    "patch_norm_backward": _patch_norm_backward_fake,
    "conv2d_norms": _conv2d_norms_fake,
    "conv2d_epilogue": _conv2d_epilogue_fake,
    "conv2d_epilogue_": _conv2d_epilogue_inplace_fake,
    "conv2d_grad_dot": _conv2d_grad_dot_fake,
    "conv2d_grad_filters": _conv2d_grad_filters_fake,
    "conv2d_grad_input": _conv2d_grad_input_fake,
    "conv2d_grad_input_": _conv2d_grad_input_inplace_fake,
    "filter_scale": _filter_scale_fake,
    "filter_scale_grad": _filter_scale_grad_fake,
    "window_norm": _patch_norm_forward_fake,
    "window_norm_grad": _patch_norm_backward_fake,
}
_FLOPS: dict[str, Callable[..., int]] = {
    "conv2d_forward": _conv2d_forward_flops,
    "conv2d_backward": _conv2d_backward_flops,
}


def register(fakes: dict[str, Callable[..., Any]], flops: dict[str, Callable[..., int]]) -> None:
    """Register fakes and, where an op has none, the FLOP formula of a pass, by op name."""
    if native.missing is not None:
        return
    for name, fake in fakes.items():
        torch.library.register_fake(f"dcconv::{name}", fake)
        register_flop_formula(getattr(torch.ops.dcconv, name))(flops.get(name, no_flops))


register(_FAKES, _FLOPS)
