"""x -> y in one pass: an implicit GEMM, groups by groups, with the operator in its epilogue."""

import triton
import triton.language as tl

from dcconv.triton.kernels.epilogue import decoupled
from dcconv.triton.kernels.product import product, share
from dcconv.triton.kernels.tiles import coordinates, offsets, place, window_norms

# Elements of a tile that go through the functions at a time. More run out of registers: with 64
# sums per thread tanh x linear had 50 more values than registers, with 32 none.
WHOLE = tl.constexpr(4096)


@triton.jit
def part(u, NUMBER: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr):
    """One of the PARTS, at most two, of a tile's lanes."""
    if PARTS == 1:
        return u
    else:
        low, high = tl.split(tl.permute(tl.reshape(u, [P, 2, LANES // 2]), [0, 2, 1]))
        if NUMBER == 0:
            return low
        else:
            return high


@triton.jit
def finish(
    u, b, first, y, dot, parameters, numbers, positions, pixels, own,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEPS_DOT: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write y and, with KEEPS_DOT, u of LANES filters of a group, from number ``first`` on."""
    image, pixel, inside = positions
    group, groups, _, filters = own
    lane = first + tl.arange(0, LANES)
    exists = lane < filters
    channel = group * filters + lane
    at = offsets(image, pixel, channel, groups * filters, pixels, LAST)
    mask = inside[:, None] & exists[None, :]
    if KEEPS_DOT:
        tl.store(dot + at, u, mask=mask)
    value = decoupled(
        u, b, parameters, channel, exists, numbers,
        MAGNITUDE, ANGULAR, TIMES_A, PER_POSITION, RADIUS, HAS_MEAN, CURVATURE, HAS_BIAS,
        P, LANES, 1,
    )  # fmt: skip
    tl.store(y + at, value, mask=mask)


@triton.jit(do_not_specialize=["bucket"])
def implicit_gemm_kernel(
    x, weight, y, dot, a, map, norm_map, bias, radius, mean, k,
    images, pixels, groups, channels, filters,
    height, width, columns,
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns,
    alpha, beta, power, eps, floor,
    bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    DENSE: tl.constexpr, FLAT: tl.constexpr,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, KEEPS_NORM: tl.constexpr, KEEPS_DOT: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, UPCASTS: tl.constexpr,
    P: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile [P, LANES] of y and, with KEEPS_DOT, of u.

    ``channels`` and ``filters`` are those of a group. NORM: ``map`` holds ``norms`` b, ``sums`` of
    squares per pixel, or nothing, and b is summed in the ``loop``. ``bucket`` tells sizes apart
    that are tuned apart, and is not read.
    """
    tile, group, first, lane = share(groups, filters, LANES)
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    exists = lane < filters
    if DENSE:
        picture = image
        row = pixel
        column = pixel
    else:
        picture, row, column = coordinates(image, pixel, pixels, columns, LAST)
    of_group = weight + group * filters * channels * (ROWS * COLUMNS)
    starts = (picture, pixel, row * stride_rows - top, column * stride_columns - left, inside)
    size = (height, width)
    own = (group, groups, channels, filters)
    u, squares = product(
        x, of_group, starts, size, dilation_rows, dilation_columns, own, lane, exists,
        False, ROWS, COLUMNS, MODE, DENSE, FLAT, NORM == "loop", LAST, PRECISION, UPCASTS,
        P, LANES, DEPTH,
    )  # fmt: skip
    group_at = group + tl.arange(0, 1)
    map_at = offsets(image, pixel, group_at, groups, pixels, LAST)
    map_mask = inside[:, None]
    if NORM == "norms":
        b = tl.load(map + map_at, mask=map_mask, other=1.0)
    elif NORM == "loop":
        b = tl.sqrt_rn(squares + eps)[:, None]
    else:
        positions = (picture, row, column, inside)
        steps = (stride_rows, stride_columns, top, left, dilation_rows, dilation_columns)
        b = window_norms(
            map, positions, group_at, groups, size, steps, eps,
            ROWS, COLUMNS, MODE, P, 1, LAST,
        )  # fmt: skip
    # All blocks of lanes have the norms: the first writes them.
    if KEEPS_NORM and NORM != "norms" and first == 0:
        tl.store(norm_map + map_at, b, mask=map_mask)
    parameters = (a, bias, radius, mean, k)
    numbers = (alpha, beta, power, floor)
    PARTS: tl.constexpr = 2 if P * LANES > WHOLE else 1
    WIDTH: tl.constexpr = LANES // PARTS
    for number in tl.static_range(PARTS):
        some = part(u, number, PARTS, P, LANES)
        finish(
            some, b, first + number * WIDTH, y, dot, parameters, numbers, (image, pixel, inside),
            pixels, own,
            MAGNITUDE, ANGULAR, TIMES_A, PER_POSITION, RADIUS, HAS_MEAN, CURVATURE, HAS_BIAS,
            KEEPS_DOT, LAST, P, WIDTH,
        )  # fmt: skip
