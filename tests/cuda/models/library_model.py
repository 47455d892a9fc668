"""A readable model of the small ops: each pass from its formula, in float64, rounded once.

The schemas stand in ``csrc/schemas.h``. ``implementations`` lists the functions by op name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import RHO_FLOOR, compute_dtype
from dcconv.passes import records

Sizes = list[int]


def layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def need_dense(layout: torch.memory_format, *tensors: Tensor | None) -> None:
    """Hold callers to what kernels rely on: elements without gaps, in the order of the layout."""
    for t in tensors:
        assert t is None or t.is_contiguous(memory_format=layout), (t.shape, t.stride(), layout)


def stored(t: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Return a new tensor with the values of ``t``, rounded, and the strides of torch.empty."""
    return torch.empty(t.shape, dtype=dtype, memory_format=layout).copy_(t)


def flat_map(t: Tensor, channels_last: bool) -> Tensor:
    """Order a map [n, g, p, q] as the kernels do."""
    return (t.permute(0, 2, 3, 1) if channels_last else t).reshape(-1)


def square_map(flat: Tensor, n: int, g: int, p: int, q: int, channels_last: bool) -> Tensor:
    """Return a map in the kernels' order as [n, g, p, q], float64."""
    if channels_last:
        return flat.double().reshape(n, p, q, g).permute(0, 3, 1, 2)
    return flat.double().reshape(n, g, p, q)


def by_filter(value: Tensor | None, filters: int) -> Tensor:
    """Return a [], [o] or absent parameter as [o, 1, 1], float64; absent is 1."""
    if value is None:
        return torch.ones(filters, 1, 1, dtype=torch.float64)
    return value.double().expand(filters).reshape(-1, 1, 1)


def radii(radius: Tensor | None, mean: Tensor | None, filters: int) -> tuple[Tensor, Tensor]:
    """Return rho on its floor, and whether it is above."""
    product = by_filter(radius, filters) * (1.0 if mean is None else mean.double())
    return product.clamp(min=RHO_FLOOR), product >= RHO_FLOOR


def spread(groups_map: Tensor, filters: int) -> Tensor:
    """Repeat a map [n, g, p, q] for every filter of a group: [n, o, p, q]."""
    return groups_map.repeat_interleave(filters // groups_map.shape[1], dim=1)


def pixel_squares(x: Tensor, groups: int) -> Tensor:
    """Sum of squares per pixel and group: [n, g, h, w]."""
    n, c, h, w = x.shape
    return x.double().square().reshape(n, groups, c // groups, h, w).sum(dim=2)


def pad_all(t: Tensor, padding: Sizes, mode: str) -> Tensor:
    top, bottom, left, right = padding
    name = "constant" if mode == "zeros" else mode
    return F.pad(t, (left, right, top, bottom), mode=name)


def norms_of(
    squares: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    eps: float,
) -> Tensor:
    """Return b = sqrt(sum of squares over each window + eps): [n, g, p, q]."""
    ones = torch.ones(groups, 1, *kernel_size, dtype=torch.float64)
    shown = pad_all(squares, padding, padding_mode)
    sums = F.conv2d(shown, ones, None, stride, 0, dilation, groups)
    return (sums.clamp(min=0.0) + eps).sqrt()


def fold(padded: Tensor, input_size: Sizes, padding: Sizes, mode: str) -> Tensor:
    """Undo a padding: every pixel gets the sum of the padded pixels that show it."""
    for axis, size, before, after in (
        (2, input_size[0], *padding[:2]),
        (3, input_size[1], *padding[2:]),
    ):
        source = torch.arange(1.0, size + 1).reshape(1, 1, size, 1)
        shown = pad_all(source, [before, after, 0, 0], mode).reshape(-1).long()
        sums = padded.new_zeros(
            [*padded.shape[:axis], size + 1, *padded.shape[axis + 1 :]]
        ).index_add_(axis, shown, padded)
        padded = sums.narrow(axis, 1, size)  # 0 is what padding with zeros shows
    return padded


def window_sums(
    t: Tensor,
    input_size: Sizes,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> Tensor:
    """Return per input pixel the sum of t over the windows that see it: [n, g, h, w]."""
    ones = torch.ones(groups, 1, *kernel_size, dtype=torch.float64)
    seen = F.conv_transpose2d(t, ones, None, stride, 0, 0, groups, dilation)
    h = input_size[0] + padding[0] + padding[1]
    w = input_size[1] + padding[2] + padding[3]
    seen = F.pad(seen, (0, w - seen.shape[3], 0, h - seen.shape[2]))
    return fold(seen, input_size, padding, padding_mode)


def filter_norm(weight: Tensor, eps: float) -> Tensor:
    return (weight.double().square().sum(dim=(1, 2, 3)) + eps).sqrt()


def magnitude_of(
    magnitude: str, weighting: str, alpha: float, beta: float, a: Tensor, b: Tensor, rho: Tensor
) -> tuple[Tensor, ...]:
    """Return h and its derivatives by b, rho and a."""
    shape = torch.broadcast_shapes(a.shape, b.shape, rho.shape)
    values = [t.expand(shape).contiguous() for t in (a, b, rho)]
    found: tuple[Tensor, ...] = torch.ops.dcconv.magnitude_grad(
        magnitude, weighting, *values, alpha, beta
    )
    return found


def angle_of(angular: str, c: Tensor, k: Tensor, power: float, delta: float) -> tuple[Tensor, ...]:
    """Return g and its derivatives by c and k."""
    found: tuple[Tensor, ...] = torch.ops.dcconv.angular_grad(
        angular, c.contiguous(), k.expand(c.shape).contiguous(), power, delta
    )
    return found[:3]


def cosine_from(g: Tensor, angular: str) -> Tensor:
    """Return c from g, for the angular functions that allow it."""
    if angular == "linear":
        return (g.clamp(-1.0, 1.0) * (torch.pi / 2)).sin()
    return g.sign() * g.abs().sqrt() if angular == "square_cosine" else g


def conv2d_norms(
    x: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    eps: float,
    batch_mean: bool,
    channels_last: bool,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    need_dense(layout_of(channels_last), x)
    need_dense(memory_format(weight), weight)
    compute = compute_dtype(x.dtype)
    squares, kernel = pixel_squares(x, groups), list(weight.shape[2:])
    if sums is not None:
        n, _, h, w = x.shape
        assert sums.dtype == compute and sums.shape == (n * groups * h * w,)
        squares = square_map(sums, n, groups, h, w, channels_last)
    b = norms_of(squares, kernel, stride, padding, dilation, groups, padding_mode, eps)
    mean = torch.empty(0, dtype=compute)
    if batch_mean:
        mean = (b.sum() / max(b.numel(), 1)).to(compute)
    a = filter_norm(weight, eps).to(compute)
    return a, flat_map(b, channels_last).to(compute, copy=True), mean


def conv2d_epilogue(
    u: Tensor,
    a: Tensor,
    map: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    input_size: Sizes,
    kernel_size: Sizes,
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
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    need_dense(layout_of(channels_last), u)
    n, filters, p, q = u.shape
    if map_is_norm:
        b = square_map(map, n, groups, p, q, channels_last)
        norm_map = a.new_empty(0)
    else:
        squares = square_map(map, n, groups, input_size[0], input_size[1], channels_last)
        b = norms_of(squares, kernel_size, stride, padding, dilation, groups, padding_mode, eps)
        norm_map = flat_map(b, channels_last).to(a.dtype, copy=True)
    b = spread(b, filters)
    norm = by_filter(a, filters)
    rho, _ = radii(radius, mean, filters)
    h = magnitude_of(magnitude, weighting, alpha, beta, norm, b, rho)[0]
    g = angle_of(angular, u.double() / norm / b, by_filter(k, filters), power, delta)[0]
    y = h * g
    if bias is not None:
        y = y + by_filter(bias, filters)
    return stored(y, u.dtype, layout_of(channels_last)), norm_map


def conv2d_epilogue_(u: Tensor, *arguments: Any) -> Tensor:
    y, norm_map = conv2d_epilogue(u, *arguments)
    u.copy_(y)
    return norm_map


def conv2d_grad_dot(
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
    need_dense(layout_of(channels_last), grad_y, kept)
    n, filters, p, q = grad_y.shape
    dy = grad_y.double()
    b = spread(square_map(norm_map, n, groups, p, q, channels_last), filters)
    norm = by_filter(a, filters)
    rho, _ = radii(radius, mean, filters)
    h, h_b, h_rho, h_a = magnitude_of(magnitude, weighting, alpha, beta, norm, b, rho)
    kept = kept.double()
    c = cosine_from(kept / h, angular) if kept_is == "output" else kept / norm / b
    g, g_c, g_k = angle_of(angular, c, by_filter(k, filters), power, delta)
    grad_u = stored(dy * h * g_c / norm / b, grad_y.dtype, layout_of(channels_last))
    # dL/db of a position, over b: grad_x gets it times x.
    t = dy * (b * h_b * g - h * c * g_c) / b.square()
    t = t.reshape(n, groups, filters // groups, p, q).sum(dim=2)
    kinds = {
        records.SUM_RHO: dy * g * h_rho,
        records.SUM_A: dy * g * h_a,
        records.SUM_K: dy * h * g_k,
        records.SUM_BIAS: dy,
    }
    parts = []
    for bit, terms in kinds.items():
        if sums & bit:
            by_position = terms.permute(0, 2, 3, 1).reshape(-1, filters)
            parts += [piece.sum(dim=0) for piece in by_position.tensor_split(rows)]
    return (
        grad_u,
        flat_map(t, channels_last).to(a.dtype, copy=True) if wants_t else a.new_empty(0),
        torch.stack(parts).reshape(-1, rows, filters).to(a.dtype) if parts else a.new_empty(0),
    )


def conv2d_grad_filters(
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
    need_dense(memory_format(weight), weight, library_grad)
    filters = weight.shape[0]
    totals = iter(parts.double().sum(dim=1)) if sums else iter(())
    total = {bit: next(totals) for bit in (1, 2, 4, 8) if sums & bit}
    norm = a.double()
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if needs & records.NEEDS_WEIGHT:
        assert library_grad is not None
        w, folded = weight.double(), library_grad.double()
        # c = u / (a b): a follows w, which takes away the part along w; h may follow a as well.
        along = -(folded * w).sum(dim=(1, 2, 3)) / norm.square()
        if records.SUM_A in total:
            along = along + total[records.SUM_A] / norm
        grad = folded + along.reshape(-1, 1, 1, 1) * w
        grad_weight = stored(grad, weight.dtype, memory_format(weight))
    if needs & records.NEEDS_BIAS:
        grad_bias = total[records.SUM_BIAS].to(weight.dtype)
    grad_radius, grad_mean, grad_k, sigma = (a.new_empty(0) for _ in range(4))
    if records.SUM_RHO in total:
        # rho = radius mean
        _, above = radii(radius, mean, filters)
        by_rho = total[records.SUM_RHO] * above.flatten()
        by_mean = (by_rho * by_filter(radius, filters).flatten()).sum()
        if needs & records.NEEDS_RADIUS and radius is not None:
            by_radius = by_rho * (1.0 if mean is None else mean.double())
            grad_radius = (by_radius if radius.dim() else by_radius.sum()).to(a.dtype)
        if needs & records.NEEDS_NORM_MEAN:
            grad_mean = by_mean.to(a.dtype)
        if barrier:
            sigma = (by_mean / max(map_count, 1)).to(a.dtype)
    if needs & records.NEEDS_K and k is not None:
        by_k = total[records.SUM_K]
        grad_k = (by_k if k.dim() else by_k.sum()).to(a.dtype)
    return grad_weight, grad_bias, grad_radius, grad_mean, grad_k, sigma


def conv2d_grad_input(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    padded: bool,
    channels_last: bool,
) -> Tensor:
    need_dense(layout_of(channels_last), library_grad, x)
    n, c, h, w = x.shape
    p, q = (
        (size + before + after - reach * (taps - 1) - 1) // step + 1
        for size, before, after, reach, taps, step in zip(
            (h, w), padding[::2], padding[1::2], dilation, kernel_size, stride, strict=True
        )
    )
    finished = t.double() if sigma is None else t.double() + sigma.double() / norm_map.double()
    seen = window_sums(
        square_map(finished, n, groups, p, q, channels_last),
        [h, w],
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
    )
    grad = library_grad.double()
    if padded:
        grad = fold(grad, [h, w], padding, padding_mode)
    grad = grad + x.double() * spread(seen, c)
    return stored(grad, x.dtype, layout_of(channels_last))


def conv2d_grad_input_(library_grad: Tensor, *arguments: Any) -> None:
    *others, channels_last = arguments
    library_grad.copy_(conv2d_grad_input(library_grad, *others, False, channels_last))


def filter_scale(weight: Tensor, alpha: float, eps: float, divide: bool) -> tuple[Tensor, Tensor]:
    need_dense(memory_format(weight), weight)
    a = filter_norm(weight, eps)
    factor = alpha / a if divide else torch.full_like(a, alpha)
    scaled = weight.double() * factor.reshape(-1, 1, 1, 1)
    compute = compute_dtype(weight.dtype)
    return stored(scaled, weight.dtype, memory_format(weight)), a.to(compute)


def filter_scale_grad(
    library_grad: Tensor, weight: Tensor, a: Tensor, alpha: float, divide: bool
) -> Tensor:
    need_dense(memory_format(weight), weight, library_grad)
    grad, w = library_grad.double() * alpha, weight.double()
    if divide:
        norm = a.double().reshape(-1, 1, 1, 1)
        grad = grad / norm
        grad = grad - (grad * w).sum(dim=(1, 2, 3), keepdim=True) / norm.square() * w
    return stored(grad, weight.dtype, memory_format(weight))


def window_norm(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    eps: float,
) -> Tensor:
    need_dense(memory_format(x), x)
    b = norms_of(
        pixel_squares(x, groups),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        eps,
    )
    return stored(b, compute_dtype(x.dtype), memory_format(x))


def window_norm_grad(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> Tensor:
    need_dense(memory_format(x), x, grad_b, b)
    seen = window_sums(
        grad_b.double() / b.double(),
        list(x.shape[2:]),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
    )
    return stored(x.double() * spread(seen, x.shape[1]), x.dtype, memory_format(x))


implementations = {
    function.__name__: function
    for function in (
        conv2d_norms,
        conv2d_epilogue,
        conv2d_epilogue_,
        conv2d_grad_dot,
        conv2d_grad_filters,
        conv2d_grad_input,
        conv2d_grad_input_,
        filter_scale,
        filter_scale_grad,
        window_norm,
        window_norm_grad,
    )
}
