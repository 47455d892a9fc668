"""x -> y of groups of one channel in one pass: dot product, patch norm and epilogue together."""

import triton
import triton.language as tl

from dcconv.triton.kernels.epilogue import decoupled
from dcconv.triton.kernels.tiles import coordinates, lanes, offsets, place, source, spread, within


@triton.jit
def depthwise_kernel(
    x, weight, y, dot, a, map, norm_map, bias, radius, mean, k,
    images, pixels, groups, per_group, chunks, all_chunks,
    height, width, columns,
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns,
    alpha, beta, power, eps, floor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    MAGNITUDE: tl.constexpr, ANGULAR: tl.constexpr, TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr, RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr, HAS_BIAS: tl.constexpr, MAP_IS_NORM: tl.constexpr,
    KEEPS_NORM: tl.constexpr, KEEPS_DOT: tl.constexpr,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of y and, with KEEPS_DOT, of u. ``map`` holds b, or b is summed in the loop."""
    program = tl.program_id(0)
    tile = program // all_chunks
    chunk = program - tile * all_chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    channel, exists, group = lanes(chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    picture, row, column = coordinates(image, pixel, pixels, columns, LAST)
    seen = inside[:, None] & (group < groups)[None, :]
    inputs = height * width
    filters = weight + channel * (ROWS * COLUMNS)
    u = tl.zeros([P, IN_GROUP * BY_GROUP], tl.float32)
    squares = tl.zeros([P, BY_GROUP], tl.float32)
    for r in range(ROWS):
        i, shown_row = source(row * stride_rows - top + r * dilation_rows, height, MODE)
        for s in tl.static_range(COLUMNS):
            j, shown = source(column * stride_columns - left + s * dilation_columns, width, MODE)
            at = within(picture, i * width + j, group, groups, inputs, LAST)
            value = tl.load(x + at, mask=seen & (shown_row & shown)[:, None], other=0.0)
            value = value.to(tl.float32)
            squares += value * value
            tap = tl.load(filters + (r * COLUMNS + s), mask=exists, other=0.0).to(tl.float32)
            u += spread(value, P, IN_GROUP, BY_GROUP) * tap[None, :]
    map_at = offsets(image, pixel, group, groups, pixels, LAST)
    if MAP_IS_NORM:
        b = tl.load(map + map_at, mask=seen, other=1.0)
    else:
        b = tl.sqrt_rn(squares + eps)
        # Tiles that share a group write the same values: only its first does.
        if KEEPS_NORM and chunk % chunks == 0:
            tl.store(norm_map + map_at, b, mask=seen)
    at = offsets(image, pixel, channel, groups * per_group, pixels, LAST)
    mask = inside[:, None] & exists[None, :]
    if KEEPS_DOT:
        tl.store(dot + at, u, mask=mask)
    parameters = (a, bias, radius, mean, k)
    numbers = (alpha, beta, power, floor)
    value = decoupled(
        u, b, parameters, channel, exists, numbers,
        MAGNITUDE, ANGULAR, TIMES_A, PER_POSITION, RADIUS, HAS_MEAN, CURVATURE, HAS_BIAS,
        P, IN_GROUP, BY_GROUP,
    )  # fmt: skip
    tl.store(y + at, value, mask=mask)
