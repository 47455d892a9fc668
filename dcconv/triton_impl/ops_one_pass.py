"""The ops of plan B on Triton kernels; importing this registers them.

Their schemas are those of ``csrc/schemas.h``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.utils.flop_counter import register_flop_formula

from dcconv import fakes_one_pass as fakes
from dcconv.fakes import no_flops
from dcconv.numerics import RHO_FLOOR
from dcconv.plan_b import IMPLICIT_GEMM
from dcconv.triton_impl.depthwise import depthwise_kernel
from dcconv.triton_impl.features import INTERPRETED, twin_of
from dcconv.triton_impl.launch import (
    NAMESPACE,
    blocks,
    filter_tile,
    matrix_tile,
    on_device,
    op,
    tiling,
)
from dcconv.triton_impl.norms import filter_norm_kernel
from dcconv.triton_impl.operands import dense, number_of, per_position, windows
from dcconv.triton_impl.pointwise import pointwise_kernel


@op("filter_norm", fakes._filter_norm_fake)
def filter_norm(weight: Tensor, eps: float) -> Tensor:
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
    n, _, h, w = x.shape
    filters, _, rows, columns = weight.shape
    p, q = windows(h, w, [rows, columns], stride, padding, dilation)
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
    functions: dict[str, Any] = {
        "MAGNITUDE": twin_of(magnitude, weighting),
        "ANGULAR": angular,
        "TIMES_A": weighting == "linear",
        "PER_POSITION": per_position(magnitude, weighting, radius),
        "RADIUS": number_of(radius),
        "HAS_MEAN": mean is not None,
        "CURVATURE": number_of(k),
        "HAS_BIAS": bias is not None,
        "MAP_IS_NORM": map_is_norm,
        "KEEPS_NORM": keep_norm,
        "KEEPS_DOT": keep_dot,
    }
    sums_or_norms = a if map is None else map
    parameters = (dense(bias, a), dense(radius, a), dense(mean, a), dense(k, a))
    if y.numel() == 0:
        return y, norm_map, dot
    if kernel == IMPLICIT_GEMM:
        product = matrix_tile(n * p * q, x.shape[1], filters)
        column_blocks = blocks(filters, product.filters)
        with on_device(x):
            wrap_triton(pointwise_kernel)[(blocks(n * p * q, product.positions) * column_blocks,)](
                x,
                weight,
                y,
                dot,
                a,
                sums_or_norms,
                norm_map,
                *parameters,
                n * p * q,
                p * q,
                x.shape[1],
                filters,
                column_blocks,
                h,
                w,
                q,
                stride[0],
                stride[1],
                alpha,
                beta,
                power,
                eps,
                RHO_FLOOR,
                STRIDED=max(stride) > 1,
                UPCASTS=INTERPRETED and x.dtype == torch.bfloat16,
                P=product.positions,
                FILTERS=product.filters,
                DEPTH=product.depth,
                num_warps=product.warps,
                **functions,
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
            **functions,
        )
    return y, norm_map, dot


#: Names of the ops.
names = tuple(name for name in fakes.FAKES if name in globals())

for _name in names:
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), _name))(
        fakes.FLOPS.get(_name, no_flops)
    )
