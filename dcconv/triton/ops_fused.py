"""The ops of plan B on Triton kernels; importing this registers them.

Their schemas are those of ``csrc/schemas.h``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.utils.flop_counter import register_flop_formula

from dcconv.operator import checks
from dcconv.operator.numerics import RHO_FLOOR
from dcconv.passes import fakes_fused as fakes
from dcconv.passes import guards
from dcconv.passes.fakes import no_flops
from dcconv.passes.fused import DEPTHWISE, IMPLICIT_GEMM
from dcconv.triton.environment import INTERPRETED, twin_of
from dcconv.triton.fused import AUTOTUNED, NAMESPACE
from dcconv.triton.kernels.depthwise import depthwise_kernel
from dcconv.triton.kernels.depthwise_grad_input import depthwise_grad_input_kernel
from dcconv.triton.kernels.depthwise_grad_weight import depthwise_grad_weight_kernel
from dcconv.triton.kernels.implicit_gemm import implicit_gemm_kernel
from dcconv.triton.kernels.implicit_gemm_grad_input import implicit_gemm_grad_input_kernel
from dcconv.triton.kernels.norms import filter_norm_kernel
from dcconv.triton.launch import blocks, filter_tile, gradient_tiling, on_device, op, tiling
from dcconv.triton.operands import dense, number_of, per_position, precision, slots
from dcconv.triton.ops_library import check_parameters, column_sums
from dcconv.triton.tiles import TILES, Product, gpu_of, programs, shares_steps, tile_of
from dcconv.triton.tuning import tuned

# depthwise_grad_weight: a program has a sum per element of its tile for so many taps at most.
TAPS = 9


@op("filter_norm", fakes._filter_norm_fake)
def filter_norm(weight: Tensor, eps: float) -> Tensor:
    guards.dimensions("weight", weight, 4)
    filters = weight.shape[0]
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    a = weight.new_empty(filters, dtype=torch.float32)
    per_program, block = filter_tile(size)
    with on_device(weight):
        wrap_triton(filter_norm_kernel)[(blocks(filters, per_program),)](
            weight,
            a,
            a,
            a,
            a,
            filters,
            size,
            0,
            1,
            1.0,
            eps,
            MEAN=False,
            SCALES=False,
            DIVIDES=False,
            FILTERS=per_program,
            BLOCK=block,
        )
    return a


def _launch(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    product: Product,
    number: int,
    x: Tensor,
    channels_last: bool,
) -> None:
    """Launch a kernel of the implicit GEMM; ``number`` names its tile, or who chooses it."""
    if not AUTOTUNED <= number < len(TILES):
        raise checks.value_error("tile", f"be from {AUTOTUNED} to {len(TILES) - 1}", number)
    constants = {
        **constants,
        "LAST": channels_last,
        "PRECISION": precision(x),
        "UPCASTS": INTERPRETED and x.dtype == torch.bfloat16,
    }
    gpu = gpu_of(x)
    with on_device(x):
        if number == AUTOTUNED:
            number = tuned(kernel, arguments, constants, product, gpu, x)
        tile = tile_of(number, product, gpu)
        wrap_triton(kernel)[(programs(tile, product),)](
            *arguments,
            0,
            P=tile.positions,
            LANES=tile.lanes,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **constants,
        )


@op("conv2d_one_pass", fakes._conv2d_one_pass_fake)
def conv2d_one_pass(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    map: Tensor | None,
    bias: Tensor | None,
    radius: Tensor | None,
    mean: Tensor | None,
    k: Tensor | None,
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
    keep_norm: bool,
    keep_dot: bool,
    kernel: str,
    tile: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.choice("kernel", kernel, (DEPTHWISE, IMPLICIT_GEMM))
    y, norm_map, dot = fakes._conv2d_one_pass_fake(
        x,
        weight,
        a,
        map,
        bias,
        radius,
        mean,
        k,
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
        keep_norm,
        keep_dot,
        kernel,
        tile,
        channels_last,
    )
    check_parameters(weight.shape[0], a, bias, radius, mean, k, x.dtype)
    n, _, h, w = x.shape
    filters, _, rows, columns = weight.shape
    p, q = y.shape[2:]
    functions: dict[str, Any] = {
        "MAGNITUDE": twin_of(magnitude, weighting),
        "ANGULAR": angular,
        "TIMES_A": weighting == "linear",
        "PER_POSITION": per_position(magnitude, weighting, radius),
        "RADIUS": number_of(radius),
        "HAS_MEAN": mean is not None,
        "CURVATURE": number_of(k),
        "HAS_BIAS": bias is not None,
        "KEEPS_NORM": keep_norm,
        "KEEPS_DOT": keep_dot,
    }
    sums_or_norms = a if map is None else map
    parameters = (dense(bias, a), dense(radius, a), dense(mean, a), dense(k, a))
    if y.numel() == 0:
        return y, norm_map, dot
    if kernel == IMPLICIT_GEMM:
        channels, taps = weight.shape[1], rows * columns
        point = taps == 1 and not any(padding)
        flat = shares_steps(taps, channels, channels_last)
        _launch(
            implicit_gemm_kernel,
            (
                x,
                weight,
                y,
                dot,
                a,
                sums_or_norms,
                norm_map,
                *parameters,
                n,
                p * q,
                groups,
                channels,
                filters // groups,
                h,
                w,
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
            ),
            {
                "ROWS": rows,
                "COLUMNS": columns,
                "MODE": padding_mode,
                "DENSE": point and max(stride) == 1,
                "FLAT": flat,
                **functions,
                "NORM": "norms" if map_is_norm else "loop" if map is None else "sums",
            },
            Product(
                n * p * q,
                1 if channels_last else n,
                groups,
                filters // groups,
                channels * taps if flat else channels,
                taps,
                flat,
                x.element_size(),
                not channels_last,
            ),
            tile,
            x,
            channels_last,
        )
        return y, norm_map, dot
    tiles = tiling(n, p * q, filters, groups, channels_last)
    with on_device(x):
        wrap_triton(depthwise_kernel)[(tiles.tiles * tiles.all_chunks,)](
            x,
            weight,
            y,
            dot,
            a,
            sums_or_norms,
            norm_map,
            *parameters,
            n,
            p * q,
            groups,
            filters // groups,
            tiles.chunks,
            tiles.all_chunks,
            h,
            w,
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
            ROWS=rows,
            COLUMNS=columns,
            MODE=padding_mode,
            LAST=channels_last,
            P=tiles.positions,
            IN_GROUP=tiles.in_group,
            BY_GROUP=tiles.by_group,
            EXACT=tiles.exact,
            MAP_IS_NORM=map_is_norm,
            **functions,
        )
    return y, norm_map, dot


def _depthwise_grad_input(
    grad_u: Tensor,
    weight: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    grad_x: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    channels_last: bool,
) -> None:
    n, _, h, w = x.shape
    top, bottom, left, right = padding
    row_slots, column_slots = slots(padding, padding_mode)
    tiles = gradient_tiling(n, h * w, groups, groups, channels_last, x.element_size())
    with on_device(x):
        wrap_triton(depthwise_grad_input_kernel)[(tiles.tiles * tiles.all_chunks,)](
            grad_u,
            weight,
            x,
            t,
            norm_map,
            dense(sigma, t),
            grad_x,
            n,
            h * w,
            groups,
            weight.shape[0] // groups,
            tiles.chunks,
            tiles.all_chunks,
            h,
            w,
            grad_u.shape[2],
            grad_u.shape[3],
            stride[0],
            stride[1],
            top,
            bottom,
            left,
            right,
            dilation[0],
            dilation[1],
            row_slots * column_slots,
            column_slots,
            ROWS=weight.shape[2],
            COLUMNS=weight.shape[3],
            MODE=padding_mode,
            WITH_MEAN=sigma is not None,
            LAST=channels_last,
            P=tiles.positions,
            BY_GROUP=tiles.by_group,
        )


@op("conv2d_one_pass_grad_input", fakes._conv2d_one_pass_grad_input_fake)
def conv2d_one_pass_grad_input(
    grad_u: Tensor,
    weight: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    kernel: str,
    tile: int,
    channels_last: bool,
) -> Tensor:
    checks.choice("kernel", kernel, (DEPTHWISE, IMPLICIT_GEMM))
    grad_x = fakes._conv2d_one_pass_grad_input_fake(
        grad_u,
        weight,
        x,
        t,
        norm_map,
        sigma,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        kernel,
        tile,
        channels_last,
    )
    guards.one_value("sigma", sigma)
    if sigma is not None:
        guards.values("norm_map", norm_map, t.shape[0])
    n, _, h, w = x.shape
    if x.numel() == 0:
        return grad_x
    if kernel == DEPTHWISE:
        _depthwise_grad_input(
            grad_u,
            weight,
            x,
            t,
            norm_map,
            sigma,
            grad_x,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            channels_last,
        )
        return grad_x
    channels, rows, columns = weight.shape[1:]
    filters, taps = weight.shape[0] // groups, rows * columns
    flat = shares_steps(taps, filters, channels_last)
    _launch(
        implicit_gemm_grad_input_kernel,
        (
            grad_u,
            weight,
            x,
            t,
            norm_map,
            t if sigma is None else sigma,
            grad_x,
            n,
            h * w,
            groups,
            filters,
            channels,
            grad_u.shape[2],
            grad_u.shape[3],
            w,
            padding[0],
            padding[2],
            dilation[0],
            dilation[1],
        ),
        {
            "ROWS": rows,
            "COLUMNS": columns,
            "DENSE": taps == 1 and not any(padding),
            "FLAT": flat,
            "WITH_MEAN": sigma is not None,
        },
        Product(
            n * h * w,
            1 if channels_last else n,
            groups,
            channels,
            filters * taps if flat else filters,
            taps,
            flat,
            x.element_size(),
            not channels_last,
        ),
        tile,
        x,
        channels_last,
    )
    return grad_x


@op("depthwise_grad_weight", fakes._depthwise_grad_weight_fake)
def depthwise_grad_weight(
    grad_u: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
    rows: int,
    weight_channels_last: bool,
    channels_last: bool,
) -> Tensor:
    grad_weight = fakes._depthwise_grad_weight_fake(
        grad_u,
        x,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        rows,
        weight_channels_last,
        channels_last,
    )
    n, filters, p, q = grad_u.shape
    taps = kernel_size[0] * kernel_size[1]
    tap_blocks = blocks(taps, TAPS)
    tiles = gradient_tiling(n, p * q, filters, groups, channels_last, x.element_size())
    parts = grad_u.new_empty((1, rows, filters * taps), dtype=torch.float32)
    with on_device(x):
        wrap_triton(depthwise_grad_weight_kernel)[(rows * tiles.all_chunks * tap_blocks,)](
            grad_u,
            x,
            parts,
            n,
            p * q,
            groups,
            filters // groups,
            tiles.chunks,
            tiles.all_chunks,
            tiles.tiles,
            blocks(tiles.tiles, rows),
            x.shape[2],
            x.shape[3],
            q,
            stride[0],
            stride[1],
            padding[0],
            padding[2],
            dilation[0],
            dilation[1],
            tap_blocks,
            ROWS=kernel_size[0],
            COLUMNS=kernel_size[1],
            MODE=padding_mode,
            TAPS=blocks(taps, tap_blocks),
            LAST=channels_last,
            P=tiles.positions,
            IN_GROUP=tiles.in_group,
            BY_GROUP=tiles.by_group,
            EXACT=tiles.exact,
        )
    # Filters of one channel lie the same way in both layouts.
    column_sums(parts, grad_weight, True)
    return grad_weight


#: Names of the ops.
names = tuple(name for name in fakes.FAKES if name in globals())

for _name in names:
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), _name))(
        fakes.FLOPS.get(_name, no_flops)
    )
