"""The passes of plan A as ops on Triton kernels; importing this registers them.

Their schemas are those of ``csrc/schemas.h``. Tensors are dense in the layout that channels_last
says; maps are 1-d.
"""

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.utils.flop_counter import register_flop_formula

from dcconv.native import NEEDS_BIAS, NEEDS_K, NEEDS_NORM_MEAN, NEEDS_RADIUS, NEEDS_WEIGHT
from dcconv.operator.numerics import RHO_FLOOR
from dcconv.passes import fakes, guards
from dcconv.passes.library import SUM_A, SUM_BIAS, SUM_K, SUM_RHO
from dcconv.triton.environment import twin_of
from dcconv.triton.fused import NAMESPACE
from dcconv.triton.kernels.epilogue import epilogue_kernel
from dcconv.triton.kernels.filters import filter_grad_kernel, parameter_grads_kernel
from dcconv.triton.kernels.grad_dot import column_sums_kernel, grad_dot_kernel
from dcconv.triton.kernels.grad_input import grad_input_kernel
from dcconv.triton.kernels.norms import filter_norm_kernel, pixel_sumsq_kernel, window_norm_kernel
from dcconv.triton.launch import (
    BLOCK,
    ELEMENTS,
    GRADIENT_ELEMENTS,
    blocks,
    filter_tile,
    on_device,
    op,
    tiling,
)
from dcconv.triton.operands import (
    dense,
    empty_like,
    format_of,
    layout,
    number_of,
    per_position,
    slots,
)

COMPUTE = torch.float32

# column_sums: rows and filters of a tile.
SUM_ROWS, SUM_FILTERS = 32, 32


def check_parameters(
    filters: int,
    a: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Require one value per filter, or one, of the dtypes that kernels read."""
    if bias is not None:
        guards.values("bias", bias, filters)
    guards.dtype("bias", bias, dtype)
    for name, t in (("radius", radius), ("k", k)):
        guards.parameter(name, t, filters)
    guards.one_value("mean", mean)
    for name, t in (("a", a), ("radius", radius), ("mean", mean), ("k", k)):
        guards.dtype(name, t, COMPUTE)


def _pixel_sumsq(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    n, c, h, w = x.shape
    sums = x.new_empty(n * groups * h * w, dtype=COMPUTE)
    tiles = tiling(n, h * w, c, groups, channels_last)
    if x.numel() > 0:
        with on_device(x):
            wrap_triton(pixel_sumsq_kernel)[(tiles.tiles * tiles.group_chunks,)](
                x,
                sums,
                n,
                h * w,
                groups,
                c // groups,
                tiles.chunks,
                tiles.group_chunks,
                LAST=channels_last,
                P=tiles.positions,
                IN_GROUP=tiles.in_group,
                BY_GROUP=tiles.by_group,
                EXACT=tiles.exact,
            )
    return sums


def _window_norm(
    sums: Tensor,
    b: Tensor,
    images: int,
    groups: int,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_mode: str,
    eps: float,
    channels_last: bool,
    wants_sums: bool,
) -> Tensor:
    """Fill b; return its partial sums, [0] where they are not wanted."""
    h, w = input_size
    p, q = guards.windows(
        [images, groups, h, w],
        groups,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
    )
    tiles = tiling(images, p * q, groups, groups, channels_last, BLOCK)
    programs = tiles.tiles * tiles.group_chunks
    partial = sums.new_empty(programs if wants_sums else 0, dtype=torch.float64)
    if b.numel() > 0:
        with on_device(sums):
            wrap_triton(window_norm_kernel)[(programs,)](
                sums,
                b,
                partial,
                images,
                p * q,
                groups,
                tiles.group_chunks,
                h,
                w,
                q,
                stride[0],
                stride[1],
                padding[0],
                padding[2],
                dilation[0],
                dilation[1],
                eps,
                ROWS=kernel_size[0],
                COLUMNS=kernel_size[1],
                MODE=padding_mode,
                SUMS=wants_sums,
                LAST=channels_last,
                P=tiles.positions,
                BY_GROUP=tiles.by_group,
            )
    return partial


@op("conv2d_norms", fakes._conv2d_norms_fake)
def conv2d_norms(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    eps: float,
    batch_mean: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    guards.filters_of(x, weight, groups)
    n, _, h, w = x.shape
    filters = weight.shape[0]
    kernel = [weight.shape[2], weight.shape[3]]
    p, q = guards.windows(x.shape, filters, kernel, stride, padding, dilation, groups, padding_mode)
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    result = _pixel_sumsq(x, groups, channels_last)
    a = x.new_empty(filters, dtype=COMPUTE)
    mean = x.new_empty(() if batch_mean else (0,), dtype=COMPUTE)
    partial = result
    if batch_mean:
        b = x.new_empty(n * groups * p * q, dtype=COMPUTE)
        partial = _window_norm(
            result,
            b,
            n,
            groups,
            [h, w],
            kernel,
            stride,
            padding,
            dilation,
            padding_mode,
            eps,
            channels_last,
            True,
        )
        result = b
    per_program, block = filter_tile(size)
    with on_device(x):
        wrap_triton(filter_norm_kernel)[(blocks(filters, per_program) + int(batch_mean),)](
            weight,
            a,
            a,
            partial,
            mean,
            filters,
            size,
            partial.numel() if batch_mean else 0,
            torch.sym_max(result.numel(), 1),
            1.0,
            eps,
            MEAN=batch_mean,
            SCALES=False,
            DIVIDES=False,
            FILTERS=per_program,
            BLOCK=block,
        )
    return a, result, mean


def _epilogue(
    u: Tensor,
    y: Tensor,
    a: Tensor,
    map: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    power: float,
    eps: float,
    map_is_norm: bool,
    channels_last: bool,
) -> Tensor:
    """Fill y; return the norm map, [0] where ``map`` is it."""
    fakes.check_epilogue(
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
    check_parameters(u.shape[1], a, bias, radius, mean, k, u.dtype)
    n, filters, p, q = u.shape
    norm_map = a.new_empty(0 if map_is_norm else n * groups * p * q)
    tiles = tiling(n, p * q, filters, groups, channels_last)
    if u.numel() > 0:
        with on_device(u):
            wrap_triton(epilogue_kernel)[(tiles.tiles * tiles.all_chunks,)](
                u,
                y,
                a,
                map,
                norm_map,
                dense(bias, a),
                dense(radius, a),
                dense(mean, a),
                dense(k, a),
                n,
                p * q,
                groups,
                filters // groups,
                tiles.chunks,
                tiles.all_chunks,
                input_size[0],
                input_size[1],
                q,
                stride[0],
                stride[1],
                padding[0],
                padding[2],
                dilation[0],
                dilation[1],
                alpha,
                beta,
                power,
                eps,
                RHO_FLOOR,
                ROWS=kernel_size[0],
                COLUMNS=kernel_size[1],
                MODE=padding_mode,
                MAGNITUDE=twin_of(magnitude, weighting),
                ANGULAR=angular,
                TIMES_A=weighting == "linear",
                PER_POSITION=per_position(magnitude, weighting, radius),
                RADIUS=number_of(radius),
                HAS_MEAN=mean is not None,
                CURVATURE=number_of(k),
                HAS_BIAS=bias is not None,
                MAP_IS_NORM=map_is_norm,
                LAST=channels_last,
                P=tiles.positions,
                IN_GROUP=tiles.in_group,
                BY_GROUP=tiles.by_group,
                EXACT=tiles.exact,
            )
    return norm_map


@op("conv2d_epilogue", fakes._conv2d_epilogue_fake)
def conv2d_epilogue(
    u: Tensor,
    a: Tensor,
    map: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
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
    y = empty_like(u, channels_last)
    norm_map = _epilogue(
        u,
        y,
        a,
        map,
        bias,
        radius,
        mean,
        k,
        input_size,
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
        eps,
        map_is_norm,
        channels_last,
    )
    return y, norm_map


@op("conv2d_epilogue_", fakes._conv2d_epilogue_inplace_fake, mutates=("u",))
def conv2d_epilogue_(
    u: Tensor,
    a: Tensor,
    map: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
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
) -> Tensor:
    return _epilogue(
        u,
        u,
        a,
        map,
        bias,
        radius,
        mean,
        k,
        input_size,
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
        eps,
        map_is_norm,
        channels_last,
    )


@op("conv2d_grad_dot", fakes._conv2d_grad_dot_fake)
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
    fakes.check_grad_dot(grad_y, kept, norm_map, a, groups, sums, rows)
    check_parameters(grad_y.shape[1], a, None, radius, mean, k, grad_y.dtype)
    n, filters, p, q = grad_y.shape
    count = norm_map.shape[0]
    kinds = bin(sums).count("1")
    # Every sum takes a register per element: more of them leave registers for smaller tiles.
    elements = ELEMENTS >> (kinds + 1) // 2
    if grad_y.dtype == COMPUTE and not channels_last:
        # A vector of 16 bytes for a thread, half of one beside three sums. With twice that mix x
        # linear and tanh x linear had two values more than registers (Triton 3.8, sm_90).
        elements = min(elements, GRADIENT_ELEMENTS >> kinds // 3)
    tiles = tiling(n, p * q, filters, groups, channels_last, elements)
    grad_u = empty_like(grad_y, channels_last)
    t = a.new_empty(tiles.chunks * count if wants_t else 0)
    parts = a.new_empty((kinds, rows, filters) if kinds else 0)
    # Without sums nothing ties a program to a row.
    programs = rows if kinds else tiles.tiles
    if grad_y.numel() > 0 or kinds:
        with on_device(grad_y):
            wrap_triton(grad_dot_kernel)[(programs * tiles.all_chunks,)](
                grad_y,
                kept,
                norm_map,
                a,
                dense(radius, a),
                dense(mean, a),
                dense(k, a),
                grad_u,
                t,
                parts,
                n,
                p * q,
                groups,
                filters // groups,
                tiles.chunks,
                tiles.all_chunks,
                tiles.tiles,
                programs,
                count,
                alpha,
                beta,
                power,
                delta,
                RHO_FLOOR,
                MAGNITUDE=twin_of(magnitude, weighting),
                ANGULAR=angular,
                TIMES_A=weighting == "linear",
                PER_POSITION=per_position(magnitude, weighting, radius),
                RADIUS=number_of(radius),
                HAS_MEAN=mean is not None,
                CURVATURE=number_of(k),
                FROM_OUTPUT=kept_is == "output",
                WANTS_T=wants_t,
                SUM_RHO=sums & SUM_RHO != 0,
                SUM_A=sums & SUM_A != 0,
                SUM_K=sums & SUM_K != 0,
                SUM_BIAS=sums & SUM_BIAS != 0,
                LAST=channels_last,
                P=tiles.positions,
                IN_GROUP=tiles.in_group,
                BY_GROUP=tiles.by_group,
                EXACT=tiles.exact,
            )
    if wants_t and tiles.chunks > 1:
        chunks = t.view(1, tiles.chunks, count)
        t = a.new_empty(count)
        column_sums(chunks, t, False)
    return grad_u, t, parts


def column_sums(parts: Tensor, totals: Tensor, wide: bool) -> None:
    """Fill totals, [kinds, count], with sums of [kinds, rows, count], in float64 if ``wide``."""
    kinds, rows, count = parts.shape
    if totals.numel() > 0:
        with on_device(parts):
            wrap_triton(column_sums_kernel)[(kinds * blocks(count, SUM_FILTERS),)](
                parts, totals, rows, count, WIDE=wide, WAYS=SUM_ROWS, BLOCK=SUM_FILTERS
            )


@op("conv2d_grad_filters", fakes._conv2d_grad_filters_fake)
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
    fakes.check_grad_filters(parts, library_grad, weight, a, sums)
    check_parameters(weight.shape[0], a, None, radius, mean, k, weight.dtype)
    filters = weight.shape[0]
    totals = a.new_empty((parts.shape[0], filters) if sums else 0, dtype=torch.float64)
    if sums:
        column_sums(parts, totals, True)

    def total(bit: int) -> Tensor:
        return totals[bin(sums & (bit - 1)).count("1")] if sums & bit else totals

    grad_weight, grad_bias, grad_radius, grad_mean, grad_k = fakes._parameter_grads(
        weight, radius, mean, k, COMPUTE, needs
    )
    sigma = a.new_empty(() if barrier else (0,))
    if needs & NEEDS_WEIGHT:
        assert library_grad is not None
        _filter_grad(library_grad, weight, a, total(SUM_A), grad_weight, 1.0, False, True, sums)
    wants_radius = bool(needs & NEEDS_RADIUS) and radius is not None
    wants_mean = bool(needs & NEEDS_NORM_MEAN) and mean is not None
    wants_k = bool(needs & NEEDS_K) and k is not None
    wants_bias = bool(needs & NEEDS_BIAS)
    if wants_radius or wants_mean or wants_k or wants_bias or barrier:
        with on_device(weight):
            wrap_triton(parameter_grads_kernel)[(1,)](
                total(SUM_RHO),
                total(SUM_K),
                total(SUM_BIAS),
                dense(radius, a),
                dense(mean, a),
                grad_radius,
                grad_mean,
                grad_k,
                grad_bias,
                sigma,
                filters,
                torch.sym_max(map_count, 1),
                RHO_FLOOR,
                RADIUS=number_of(radius),
                HAS_MEAN=mean is not None,
                CURVATURE=number_of(k) if wants_k else "none",
                SUM_RHO=sums & SUM_RHO != 0,
                WANTS_RADIUS=wants_radius,
                WANTS_MEAN=wants_mean,
                WANTS_BIAS=wants_bias,
                WANTS_SIGMA=barrier,
                BLOCK=BLOCK,
            )
    return grad_weight, grad_bias, grad_radius, grad_mean, grad_k, sigma


def _filter_grad(
    library_grad: Tensor,
    weight: Tensor,
    a: Tensor,
    by_a: Tensor,
    grad_weight: Tensor,
    alpha: float,
    divides: bool,
    projects: bool,
    sums: int,
) -> None:
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    per_program, block = filter_tile(size)
    with on_device(weight):
        wrap_triton(filter_grad_kernel)[(blocks(weight.shape[0], per_program),)](
            library_grad,
            weight,
            a,
            by_a,
            grad_weight,
            weight.shape[0],
            size,
            alpha,
            DIVIDES=divides,
            PROJECTS=projects,
            HAS_A=sums & SUM_A != 0,
            FILTERS=per_program,
            BLOCK=block,
        )


def _grad_input(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    grad_x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    tap: str,
    library: str,
    channels_last: bool,
) -> None:
    n, c, h, w = x.shape
    p, q = guards.windows(
        x.shape, groups, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    guards.one_value("sigma", sigma)
    if tap == "with_mean":
        guards.values("norm_map", norm_map, n * groups * p * q)
    tiles = tiling(n, h * w, c, groups, channels_last)
    top, bottom, left, right = padding
    row_slots, column_slots = slots(padding, padding_mode)
    if x.numel() > 0:
        with on_device(x):
            wrap_triton(grad_input_kernel)[(tiles.tiles * tiles.all_chunks,)](
                library_grad,
                x,
                t,
                norm_map,
                dense(sigma, t),
                grad_x,
                n,
                h * w,
                groups,
                c // groups,
                tiles.chunks,
                tiles.all_chunks,
                h,
                w,
                p,
                q,
                stride[0],
                stride[1],
                top,
                bottom,
                left,
                right,
                dilation[0],
                dilation[1],
                row_slots,
                column_slots,
                ROWS=kernel_size[0],
                COLUMNS=kernel_size[1],
                MODE=padding_mode,
                TAP=tap,
                LIBRARY=library,
                LAST=channels_last,
                P=tiles.positions,
                IN_GROUP=tiles.in_group,
                BY_GROUP=tiles.by_group,
                EXACT=tiles.exact,
            )


@op("conv2d_grad_input", fakes._conv2d_grad_input_fake)
def conv2d_grad_input(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    padded: bool,
    channels_last: bool,
) -> Tensor:
    fakes.check_grad_input(
        library_grad, x, t, kernel_size, stride, padding, dilation, groups, padding_mode, padded
    )
    grad_x = empty_like(x, channels_last)
    _grad_input(
        library_grad,
        x,
        t,
        norm_map,
        sigma,
        grad_x,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        "plain" if sigma is None else "with_mean",
        "padded" if padded else "same",
        channels_last,
    )
    return grad_x


@op("conv2d_grad_input_", fakes._conv2d_grad_input_inplace_fake, mutates=("library_grad",))
def conv2d_grad_input_(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    channels_last: bool,
) -> None:
    fakes.check_grad_input(
        library_grad, x, t, kernel_size, stride, padding, dilation, groups, padding_mode, False
    )
    _grad_input(
        library_grad,
        x,
        t,
        norm_map,
        sigma,
        library_grad,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        "plain" if sigma is None else "with_mean",
        "same",
        channels_last,
    )


@op("filter_scale", fakes._filter_scale_fake)
def filter_scale(weight: Tensor, alpha: float, eps: float, divide: bool) -> tuple[Tensor, Tensor]:
    guards.dimensions("weight", weight, 4)
    scaled = empty_like(weight, format_of(weight))
    a = weight.new_empty(weight.shape[0], dtype=COMPUTE)
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    per_program, block = filter_tile(size)
    with on_device(weight):
        wrap_triton(filter_norm_kernel)[(blocks(weight.shape[0], per_program),)](
            weight,
            a,
            scaled,
            a,
            a,
            weight.shape[0],
            size,
            0,
            1,
            alpha,
            eps,
            MEAN=False,
            SCALES=True,
            DIVIDES=divide,
            FILTERS=per_program,
            BLOCK=block,
        )
    return scaled, a


@op("filter_scale_grad", fakes._filter_scale_grad_fake)
def filter_scale_grad(
    library_grad: Tensor, weight: Tensor, a: Tensor, alpha: float, divide: bool
) -> Tensor:
    fakes.check_grad_filters(weight, library_grad, weight, a, 0)
    grad_weight = empty_like(weight, format_of(weight))
    _filter_grad(library_grad, weight, a, a, grad_weight, alpha, divide, divide, 0)
    return grad_weight


@op("window_norm", fakes._patch_norm_forward_fake)
def window_norm(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    eps: float,
) -> Tensor:
    p, q = guards.windows(
        x.shape, groups, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    n, _, h, w = x.shape
    last = format_of(x)
    sums = _pixel_sumsq(x, groups, last)
    b = torch.empty((n, groups, p, q), dtype=COMPUTE, device=x.device, memory_format=layout(last))
    _window_norm(
        sums,
        b,
        n,
        groups,
        [h, w],
        kernel_size,
        stride,
        padding,
        dilation,
        padding_mode,
        eps,
        last,
        False,
    )
    return b


@op("window_norm_grad", fakes._patch_norm_backward_fake)
def window_norm_grad(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    fakes.check_window_grad(
        grad_b, x, b, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    last = format_of(x)
    grad_x = empty_like(x, last)
    _grad_input(
        x,
        x,
        grad_b,
        b,
        None,
        grad_x,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        "over_norm",
        "none",
        last,
    )
    return grad_x


#: Names of the ops.
names = tuple(name for name in fakes._FAKES if name in globals())

for _name in names:
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), _name))(fakes.no_flops)
