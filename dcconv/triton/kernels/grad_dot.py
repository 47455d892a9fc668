"""The pass over dy: du, the row scalar t of the patch-norm gradient, and partial column sums.

du = dy h g_c / (a b), t = sum_o dy (d g + h e) / b^2. Sums have a fixed order: a program leaves one
row of column sums, ``column_sums_kernel`` adds them.
"""

import triton
import triton.language as tl

from dcconv.triton.kernels.epilogue import curvature_of, radius_of
from dcconv.triton.kernels.functions import angular_grad, cosine_from, magnitude_grad
from dcconv.triton.kernels.tiles import group_sums, lanes, offsets, place, spread


@triton.jit
def grad_dot_kernel(
    grad_y, kept, norm_map, a, radius, mean, k,
    grad_u, t, parts,
    images, pixels, groups, per_group, chunks, all_chunks,
    tiles, rows, map_count,
    alpha, beta, power, delta, floor,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, FROM_OUTPUT: tl.constexpr, WANTS_T: tl.constexpr,
    SUM_RHO: tl.constexpr, SUM_A: tl.constexpr, SUM_K: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Every ``rows``-th tile of a chunk of lanes.

    t is [chunks, map]: the sum over the lanes of each tile that shares a group.
    """
    LANES: tl.constexpr = IN_GROUP * BY_GROUP
    program = tl.program_id(0)
    part = program // all_chunks
    chunk = program - part * all_chunks
    channel, exists, group = lanes(chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    norm = tl.load(a + channel, mask=exists, other=1.0)[None, :]
    rho = radius_of(radius, mean, channel, exists, floor, RADIUS, HAS_MEAN)
    curvature = curvature_of(k, channel, exists, CURVATURE)
    # Per element: added up over the tile only at the end.
    by_rho = tl.zeros([P, LANES], tl.float32)
    by_a = tl.zeros([P, LANES], tl.float32)
    by_k = tl.zeros([P, LANES], tl.float32)
    by_bias = tl.zeros([P, LANES], tl.float32)
    for tile in range(part, tiles, rows):
        image, pixel, inside = place(tile, images, pixels, P, LAST)
        at = offsets(image, pixel, channel, groups * per_group, pixels, LAST)
        mask = inside[:, None] & exists[None, :]
        dy = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
        map_at = offsets(image, pixel, group, groups, pixels, LAST)
        map_mask = inside[:, None] & (group < groups)[None, :]
        b = tl.load(norm_map + map_at, mask=map_mask, other=1.0)
        if PER_POSITION:
            h, d, h_rho, h_a = magnitude_grad(1.0, b, rho, alpha, beta, MAGNITUDE)
            h = spread(h, P, IN_GROUP, BY_GROUP)
            d = spread(d, P, IN_GROUP, BY_GROUP)
            h_rho = spread(h_rho, P, IN_GROUP, BY_GROUP)
            h_a = spread(h_a, P, IN_GROUP, BY_GROUP)
        else:
            wide = spread(b, P, IN_GROUP, BY_GROUP)
            h, d, h_rho, h_a = magnitude_grad(norm, wide, rho, alpha, beta, MAGNITUDE)
        if TIMES_A:
            h_a = h
            h = h * norm
            d = d * norm
            h_rho = h_rho * norm
        scale = (1.0 / norm) * spread(1.0 / b, P, IN_GROUP, BY_GROUP)
        if FROM_OUTPUT:
            # h = 0 only where it underflowed, and y with it: any divisor gives g = 0.
            cosine = cosine_from(value / tl.where(h == 0.0, 1.0, h), ANGULAR)
        else:
            cosine = value * scale
        g, g_c, e, g_k = angular_grad(cosine, curvature, power, delta, ANGULAR)
        tl.store(grad_u + at, dy * h * g_c * scale, mask=mask)
        if WANTS_T:
            inverse = 1.0 / b
            sums = group_sums(dy * (d * g + h * e), P, IN_GROUP, BY_GROUP)
            t_at = (chunk % chunks).to(tl.int64) * map_count + map_at
            tl.store(t + t_at, sums * inverse * inverse, mask=map_mask)
        if SUM_RHO:
            by_rho += dy * g * h_rho
        if SUM_A:
            by_a += dy * g * h_a
        if SUM_K:
            by_k += dy * h * g_k
        if SUM_BIAS:
            by_bias += dy
    filters = groups * per_group
    at = part.to(tl.int64) * filters + channel
    kind = tl.cast(rows, tl.int64) * filters
    if SUM_RHO:
        tl.store(parts + at, tl.sum(by_rho, axis=0), mask=exists)
        at += kind
    if SUM_A:
        tl.store(parts + at, tl.sum(by_a, axis=0), mask=exists)
        at += kind
    if SUM_K:
        tl.store(parts + at, tl.sum(by_k, axis=0), mask=exists)
        at += kind
    if SUM_BIAS:
        tl.store(parts + at, tl.sum(by_bias, axis=0), mask=exists)


@triton.jit
def column_sums_kernel(
    parts, totals, rows, count, WIDE: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts [kinds, rows, count] -> totals [kinds, count], summed in float64 if WIDE."""
    blocks = (count + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    kind = program // blocks
    i = (program - kind * blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([WAYS, BLOCK], tl.float64 if WIDE else tl.float32)
    for start in range(0, rows, WAYS):
        row = start + tl.arange(0, WAYS)
        at = (kind * rows + row)[:, None] * count + i[None, :]
        mask = (row < rows)[:, None] & (i < count)[None, :]
        total += tl.load(parts + at, mask=mask, other=0.0).to(total.dtype)
    value = tl.sum(total, axis=0)
    if totals.dtype.element_ty != tl.float64:
        # Not every target rounds from float64 to bfloat16.
        value = value.to(tl.float32)
    tl.store(totals + kind * count + i, value, mask=i < count)
