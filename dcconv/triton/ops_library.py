"""The passes around a library convolution as ops on Triton kernels; importing this registers them.

Their schemas are those of ``csrc/schemas.h``. Tensors are dense in the layout that channels_last
says; maps are 1-d.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dcconv.operator.numerics import RHO_FLOOR
from dcconv.passes import guards, ops, records
from dcconv.passes.products import size_of
from dcconv.triton import operands
from dcconv.triton.kernels.affine_relu import affine_relu_kernel
from dcconv.triton.kernels.epilogue import epilogue_kernel
from dcconv.triton.kernels.filters import filter_grad_kernel, parameter_grads_kernel
from dcconv.triton.kernels.grad_dot import column_sums_kernel, grad_dot_kernel
from dcconv.triton.kernels.grad_input import grad_input_kernel
from dcconv.triton.kernels.norms import filter_norm_kernel, pixel_sumsq_kernel, window_norm_kernel
from dcconv.triton.launch import BLOCK, blocks, filter_tiling, launch, op, sums_elements, tiling

COMPUTE = torch.float32

# column_sums: rows and filters of a tile.
SUM_ROWS, SUM_FILTERS = 32, 32


def check_parameters(
    filters: int, a: Tensor, bias: Tensor | None, parameters: records.Parameters, dtype: torch.dtype
) -> None:
    """Require one value per filter, or one, of the dtypes that kernels read."""
    if bias is not None:
        guards.values("bias", bias, filters)
    guards.dtype("bias", bias, dtype)
    for name, t in (("radius", parameters.radius), ("k", parameters.k)):
        guards.parameter(name, t, filters)
    guards.one_value("mean", parameters.mean)
    for name, t in (("a", a), *parameters._asdict().items()):
        guards.dtype(name, t, COMPUTE)


def _pixel_sumsq(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    n, c, h, w = x.shape
    sums = x.new_empty(n * groups * h * w, dtype=COMPUTE)
    tiles = tiling(n, h * w, c, groups, channels_last)
    if x.numel() > 0:
        programs = tiles.tiles * tiles.group_chunks
        arguments = (x, sums, *tiles.sizes[:-1], tiles.group_chunks)
        launch(pixel_sumsq_kernel, programs)(*arguments, **tiles.constants)
    return sums


def _window_norm(
    call: records.WindowNorm, sums: Tensor, b: Tensor, channels_last: bool, wants_sums: bool
) -> Tensor:
    """Fill b; return its partial sums, [0] where they are not wanted."""
    (n, _, h, w), window = call.x.shape, call.window
    groups = window.groups
    p, q = guards.windows([n, groups, h, w], groups, call.kernel_size, window)
    tiles = tiling(n, p * q, groups, groups, channels_last, BLOCK)
    programs = tiles.tiles * tiles.group_chunks
    partial = sums.new_empty(programs if wants_sums else 0, dtype=torch.float64)
    if b.numel() > 0:
        launch(window_norm_kernel, programs)(
            *(sums, b, partial, n, p * q, groups, tiles.group_chunks),
            *(h, w, q, *operands.steps(window), call.eps),
            SUMS=wants_sums,
            **operands.window_constants(call.kernel_size, window),
            **tiles.map_constants,
        )
    return partial


class Mean(NamedTuple):
    """The mean norm, and what it is finished from: partial sums and the number of norms."""

    mean: Tensor
    partial: Tensor
    norms: int | torch.SymInt


def filter_norms(
    call: records.FilterScale, a: Tensor, scaled: Tensor | None = None, mean: Mean | None = None
) -> None:
    """Fill the norms of filters and, where they are given, the scaled filters and the mean norm."""
    weight = call.weight
    tiles = filter_tiling(weight)
    tensors = (weight, a, a if scaled is None else scaled)
    means = (a, a) if mean is None else (mean.partial, mean.mean)
    counts = (0, 1) if mean is None else (mean.partial.numel(), mean.norms)
    launch(filter_norm_kernel, tiles.programs + int(mean is not None))(
        *(*tensors, *means, *tiles[:2], *counts, call.alpha, call.eps),
        MEAN=mean is not None,
        SCALES=scaled is not None,
        DIVIDES=call.divide,
        **tiles.constants,
    )


@op(ops.conv2d_norms)
def conv2d_norms(call: records.Norms) -> ops.Three:
    x, weight, window, last = call.x, call.weight, call.window, call.channels_last
    n, filters, p, q = ops.result_sizes(x, weight, window)
    a = x.new_empty(filters, dtype=COMPUTE)
    b = x.new_empty(n * window.groups * p * q, dtype=COMPUTE)
    mean = x.new_empty(() if call.batch_mean else (0,), dtype=COMPUTE)
    windows = records.WindowNorm(x, size_of(weight), window, call.eps)
    sums = call.sums
    ops.check_sums(sums, x, window.groups)
    sums = _pixel_sumsq(x, window.groups, last) if sums is None else sums.contiguous()
    partial = _window_norm(windows, sums, b, last, call.batch_mean)
    finished = Mean(mean, partial, torch.sym_max(b.numel(), 1)) if call.batch_mean else None
    filter_norms(records.FilterScale(weight, 1.0, call.eps, False), a, mean=finished)
    return a, b, mean


def _epilogue(call: records.Epilogue, y: Tensor, norm_map: Tensor) -> None:
    """Fill y, and the norm map where ``map`` is not it."""
    u, a, window = call.u, call.a, call.window
    check_parameters(u.shape[1], a, call.bias, call.parameters, u.dtype)
    n, filters, p, q = u.shape
    tiles = tiling(n, p * q, filters, window.groups, call.channels_last)
    if u.numel() > 0:
        launch(epilogue_kernel, tiles.programs)(
            *(u, y, a, call.map, norm_map, operands.dense(call.bias, a)),
            *(*operands.dense_parameters(call.parameters, a), *tiles.sizes),
            *(*call.input_size, q, *operands.steps(window)),
            *(*call.functions[3:], call.eps, RHO_FLOOR),
            HAS_BIAS=call.bias is not None,
            MAP_IS_NORM=call.map_is_norm,
            **operands.function_constants(call.functions, call.parameters),
            **operands.window_constants(call.kernel_size, window),
            **tiles.constants,
        )


@op(ops.conv2d_epilogue)
def conv2d_epilogue(call: records.Epilogue) -> ops.Two:
    y, norm_map = ops.conv2d_epilogue.fake(call)
    _epilogue(call, y, norm_map)
    return y, norm_map


@op(ops.conv2d_epilogue_)
def conv2d_epilogue_(call: records.Epilogue) -> Tensor:
    norm_map = ops.conv2d_epilogue_.fake(call)
    _epilogue(call, call.u, norm_map)
    return norm_map


@op(ops.conv2d_grad_dot)
def conv2d_grad_dot(call: records.GradDot) -> ops.Three:
    ops.check_grad_dot(call)
    grad_y, a, sums = call.grad_y, call.a, call.sums
    check_parameters(grad_y.shape[1], a, None, call.parameters, grad_y.dtype)
    n, filters, p, q = grad_y.shape
    count = call.norm_map.shape[0]
    kinds = bin(sums).count("1")
    elements = sums_elements(kinds, grad_y.dtype == COMPUTE and not call.channels_last)
    tiles = tiling(n, p * q, filters, call.groups, call.channels_last, elements)
    grad_u = ops.empty_like(grad_y, call.channels_last)
    t = a.new_empty(tiles.chunks * count if call.wants_t else 0)
    parts = a.new_empty((kinds, call.rows, filters) if kinds else 0)
    # Without sums nothing ties a program to a row.
    programs = call.rows if kinds else tiles.tiles
    if grad_y.numel() > 0 or kinds:
        launch(grad_dot_kernel, programs * tiles.all_chunks)(
            *(grad_y, call.kept, call.norm_map, a),
            *operands.dense_parameters(call.parameters, a),
            *(grad_u, t, parts, *tiles.sizes, tiles.tiles, programs, count),
            *(*call.functions[3:], call.delta, RHO_FLOOR),
            FROM_OUTPUT=call.kept_is == records.OUTPUT,
            WANTS_T=call.wants_t,
            SUM_RHO=sums & records.SUM_RHO != 0,
            SUM_A=sums & records.SUM_A != 0,
            SUM_K=sums & records.SUM_K != 0,
            SUM_BIAS=sums & records.SUM_BIAS != 0,
            **operands.function_constants(call.functions, call.parameters),
            **tiles.constants,
        )
    if call.wants_t and tiles.chunks > 1:
        chunks = t.view(1, tiles.chunks, count)
        t = a.new_empty(count)
        column_sums(chunks, t, False)
    return grad_u, t, parts


def column_sums(parts: Tensor, totals: Tensor, wide: bool) -> None:
    """Fill totals, [kinds, count], with sums of [kinds, rows, count], in float64 if ``wide``."""
    kinds, rows, count = parts.shape
    if totals.numel() > 0:
        launch(column_sums_kernel, kinds * blocks(count, SUM_FILTERS))(
            parts,
            totals,
            rows,
            count,
            WIDE=wide,
            WAYS=SUM_ROWS,
            BLOCK=SUM_FILTERS,
        )


@op(ops.conv2d_grad_filters)
def conv2d_grad_filters(call: records.GradFilters) -> ops.Six:
    grads = ops.conv2d_grad_filters.fake(call)
    grad_weight, grad_bias, *grad_parameters, sigma = grads
    weight, a, sums, needs = call.weight, call.a, call.sums, call.needs
    radius, mean, k = call.parameters
    filters = weight.shape[0]
    check_parameters(filters, a, None, call.parameters, weight.dtype)
    totals = a.new_empty((call.parts.shape[0], filters) if sums else 0, dtype=torch.float64)
    if sums:
        column_sums(call.parts, totals, True)

    def total(bit: int) -> Tensor:
        return totals[bin(sums & (bit - 1)).count("1")] if sums & bit else totals

    if needs & records.NEEDS_WEIGHT:
        assert call.library_grad is not None
        library = records.FilterScaleGrad(call.library_grad, weight, a, 1.0, False)
        by_a = total(records.SUM_A) if sums & records.SUM_A else None
        _filter_grad(library, grad_weight, True, by_a)
    wants_radius = bool(needs & records.NEEDS_RADIUS) and radius is not None
    wants_mean = bool(needs & records.NEEDS_NORM_MEAN) and mean is not None
    wants_k = bool(needs & records.NEEDS_K) and k is not None
    wants_bias = bool(needs & records.NEEDS_BIAS)
    if wants_radius or wants_mean or wants_k or wants_bias or call.barrier:
        launch(parameter_grads_kernel, 1)(
            *(total(records.SUM_RHO), total(records.SUM_K), total(records.SUM_BIAS)),
            *operands.dense_parameters(call.parameters, a)[:2],
            *(*grad_parameters, grad_bias, sigma),
            *(filters, torch.sym_max(call.map_count, 1), RHO_FLOOR),
            RADIUS=operands.number_of(radius),
            HAS_MEAN=mean is not None,
            CURVATURE=operands.number_of(k) if wants_k else "none",
            SUM_RHO=sums & records.SUM_RHO != 0,
            WANTS_RADIUS=wants_radius,
            WANTS_MEAN=wants_mean,
            WANTS_BIAS=wants_bias,
            WANTS_SIGMA=call.barrier,
            BLOCK=BLOCK,
        )
    return grads


def _filter_grad(
    call: records.FilterScaleGrad, grad_weight: Tensor, projects: bool, by_a: Tensor | None
) -> None:
    weight, a = call.weight, call.a
    tiles = filter_tiling(weight)
    launch(filter_grad_kernel, tiles.programs)(
        *(call.library_grad, weight, a, operands.dense(by_a, a), grad_weight),
        *(*tiles[:2], call.alpha),
        DIVIDES=call.divide,
        PROJECTS=projects,
        HAS_A=by_a is not None,
        **tiles.constants,
    )


def _grad_input(call: records.GradInput, grad_x: Tensor, library: str, tap: str = "") -> None:
    x, (t, norm_map, sigma), window = call.x, call.taps, call.window
    tap = tap or ("plain" if sigma is None else "with_mean")
    n, c, h, w = x.shape
    p, q = guards.windows(x.shape, window.groups, call.kernel_size, window)
    guards.one_value("sigma", sigma)
    if tap == "with_mean":
        guards.values("norm_map", norm_map, n * window.groups * p * q)
    tiles = tiling(n, h * w, c, window.groups, call.channels_last)
    if x.numel() > 0:
        launch(grad_input_kernel, tiles.programs)(
            *(call.library_grad, x, t, norm_map, operands.dense(sigma, t), grad_x),
            *(*tiles.sizes, h, w, p, q, *operands.edges(window), *operands.slots(window)),
            **{"TAP": tap, "LIBRARY": library},
            **operands.window_constants(call.kernel_size, window),
            **tiles.constants,
        )


@op(ops.conv2d_grad_input)
def conv2d_grad_input(call: records.GradInput) -> Tensor:
    grad_x = ops.conv2d_grad_input.fake(call)
    _grad_input(call, grad_x, "padded" if call.padded else "same")
    return grad_x


@op(ops.conv2d_grad_input_)
def conv2d_grad_input_(call: records.GradInput) -> None:
    ops.conv2d_grad_input_.fake(call)
    _grad_input(call, call.library_grad, "same")


@op(ops.filter_scale)
def filter_scale(call: records.FilterScale) -> ops.Two:
    scaled, a = ops.filter_scale.fake(call)
    filter_norms(call, a, scaled)
    return scaled, a


@op(ops.filter_scale_grad)
def filter_scale_grad(call: records.FilterScaleGrad) -> Tensor:
    grad_weight = ops.filter_scale_grad.fake(call)
    _filter_grad(call, grad_weight, call.divide, None)
    return grad_weight


@op(ops.affine_relu)
def affine_relu(call: records.AffineRelu) -> ops.Two:
    y, sums = ops.affine_relu.fake(call)
    x = call.x
    guards.dtype("scale", call.scale, COMPUTE)
    n, c, h, w = x.shape
    tiles = tiling(n, h * w, c, call.groups, call.channels_last)
    if x.numel() > 0:
        tensors = (x, call.scale.contiguous(), call.shift.contiguous(), y, sums)
        launch(affine_relu_kernel, tiles.tiles * tiles.group_chunks)(
            *(*tensors, *tiles.sizes[:-1], tiles.group_chunks),
            **tiles.constants,
        )
    return y, sums


@op(ops.window_norm)
def window_norm(call: records.WindowNorm) -> Tensor:
    b, last = ops.window_norm.fake(call), operands.format_of(call.x)
    _window_norm(call, _pixel_sumsq(call.x, call.window.groups, last), b, last, False)
    return b


@op(ops.window_norm_grad)
def window_norm_grad(call: records.WindowNormGrad) -> Tensor:
    grad_x, last = ops.window_norm_grad.fake(call), operands.format_of(call.x)
    taps = records.Taps(call.grad_b, call.b, None)
    own = records.GradInput(call.x, call.x, taps, call.kernel_size, call.window, False, last)
    _grad_input(own, grad_x, "none", "over_norm")
    return grad_x
