"""u -> y = h(a, b) g(u / (a b)) + bias in one pass, in place over u allowed."""

import triton
import triton.language as tl

from dcconv.triton.kernels.functions import angular_value, at_least, magnitude_value
from dcconv.triton.kernels.tiles import coordinates, lanes, offsets, place, spread, window_norms


@triton.jit
def radius_of(
    radius, mean, channel, exists, floor, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr
):  # fmt: skip
    """rho = max(radius * mean, floor), one value or one per lane."""
    if RADIUS == "filter":
        rho = tl.load(radius + channel, mask=exists, other=1.0)[None, :]
    elif RADIUS == "one":
        rho = tl.load(radius)
    else:
        rho = 1.0
    if HAS_MEAN:
        rho = rho * tl.load(mean)
    return at_least(rho, floor)


@triton.jit
def curvature_of(k, channel, exists, CURVATURE: tl.constexpr):
    if CURVATURE == "filter":
        value = tl.load(k + channel, mask=exists, other=1.0)[None, :]
    elif CURVATURE == "one":
        value = tl.load(k)
    else:
        value = 1.0
    return value


@triton.jit
def decoupled(
    u, b, parameters, channel, exists, numbers,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, HAS_BIAS: tl.constexpr,
    P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
):  # fmt: skip
    """y of a tile, u [P, LANES] and b [P, BY_GROUP].

    PER_POSITION: h depends on the position alone, up to a factor a.
    """
    a, bias, radius, mean, k = parameters
    alpha, beta, power, floor = numbers
    norm = tl.load(a + channel, mask=exists, other=1.0)[None, :]
    rho = radius_of(radius, mean, channel, exists, floor, RADIUS, HAS_MEAN)
    if PER_POSITION:
        h = spread(magnitude_value(1.0, b, rho, alpha, beta, MAGNITUDE), P, IN_GROUP, BY_GROUP)
    else:
        wide = spread(b, P, IN_GROUP, BY_GROUP)
        h = magnitude_value(norm, wide, rho, alpha, beta, MAGNITUDE)
    if TIMES_A:
        h = h * norm
    cosine = u * ((1.0 / norm) * spread(1.0 / b, P, IN_GROUP, BY_GROUP))
    curvature = curvature_of(k, channel, exists, CURVATURE)
    y = h * angular_value(cosine, curvature, power, ANGULAR)
    if HAS_BIAS:
        y += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def epilogue_kernel(
    u, y, a, map, norm_map, bias, radius, mean, k,
    images, pixels, groups, per_group, chunks, all_chunks,
    height, width, columns,
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns,
    alpha, beta, power, eps, floor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, HAS_BIAS: tl.constexpr, MAP_IS_NORM: tl.constexpr,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of y. ``map`` holds b, or sums of squares, from which b is taken and written."""
    program = tl.program_id(0)
    tile = program // all_chunks
    chunk = program - tile * all_chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    channel, exists, group = lanes(chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    at = offsets(image, pixel, channel, groups * per_group, pixels, LAST)
    mask = inside[:, None] & exists[None, :]
    dot = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
    map_at = offsets(image, pixel, group, groups, pixels, LAST)
    map_mask = inside[:, None] & (group < groups)[None, :]
    if MAP_IS_NORM:
        b = tl.load(map + map_at, mask=map_mask, other=1.0)
    else:
        picture, row, column = coordinates(image, pixel, pixels, columns, LAST)
        positions = (picture, row, column, inside)
        steps = (stride_rows, stride_columns, top, left, dilation_rows, dilation_columns)
        b = window_norms(
            map, positions, group, groups, (height, width), steps, eps,
            ROWS, COLUMNS, MODE, P, BY_GROUP, LAST,
        )  # fmt: skip
        # Tiles that share a group write the same values: only its first does.
        if chunk % chunks == 0:
            tl.store(norm_map + map_at, b, mask=map_mask)
    parameters = (a, bias, radius, mean, k)
    numbers = (alpha, beta, power, floor)
    value = decoupled(
        dot, b, parameters, channel, exists, numbers,
        MAGNITUDE, ANGULAR, TIMES_A, PER_POSITION, RADIUS, HAS_MEAN, CURVATURE, HAS_BIAS,
        P, IN_GROUP, BY_GROUP,
    )  # fmt: skip
    tl.store(y + at, value, mask=mask)
