"""x -> y of ungrouped 1x1 layers in channels_last order: a matrix product with the epilogue inside.

The patch norm is the norm of a row of the left matrix: it is summed in the loop.
"""

import triton
import triton.language as tl

from dcconv.triton_impl.epilogue import decoupled
from dcconv.triton_impl.tiles import coordinates


@triton.jit
def pointwise_kernel(
    x,
    weight,
    y,
    dot,
    a,
    map,
    norm_map,
    bias,
    radius,
    mean,
    k,
    positions,
    pixels,
    channels,
    filters,
    column_blocks,
    height,
    width,
    columns,
    stride_rows,
    stride_columns,
    alpha,
    beta,
    power,
    eps,
    floor,
    MAGNITUDE: tl.constexpr,
    ANGULAR: tl.constexpr,
    TIMES_A: tl.constexpr,
    PER_POSITION: tl.constexpr,
    RADIUS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    CURVATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAP_IS_NORM: tl.constexpr,
    KEEPS_NORM: tl.constexpr,
    KEEPS_DOT: tl.constexpr,
    STRIDED: tl.constexpr,
    UPCASTS: tl.constexpr,
    P: tl.constexpr,
    FILTERS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile [P, FILTERS] of y and, with KEEPS_DOT, of u. ``map`` holds b, or b is summed.

    UPCASTS: products in float32, for the interpreter, which multiplies the bits of bfloat16.
    """
    # Neighbouring programs share the rows of x.
    program = tl.program_id(0).to(tl.int64)
    tile = program // column_blocks
    block = program - tile * column_blocks
    position = tile * P + tl.arange(0, P)
    inside = position < positions
    channel = block * FILTERS + tl.arange(0, FILTERS)
    exists = channel < filters
    if STRIDED:
        image, row, column = coordinates(position * 0, position, pixels, columns, True)
        source = (image * height + row * stride_rows) * width + column * stride_columns
    else:
        source = position
    u = tl.zeros([P, FILTERS], tl.float32)
    squares = tl.zeros([P, DEPTH], tl.float32)
    for start in range(0, channels, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        there = depth < channels
        left = tl.load(
            x + source[:, None] * channels + depth[None, :],
            mask=inside[:, None] & there[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + channel[None, :] * channels + depth[:, None],
            mask=exists[None, :] & there[:, None],
            other=0.0,
        )
        if not MAP_IS_NORM:
            value = left.to(tl.float32)
            squares += value * value
        if UPCASTS:
            u += tl.dot(left.to(tl.float32), right.to(tl.float32))
        else:
            u += tl.dot(left, right)
    if MAP_IS_NORM:
        b = tl.load(map + position, mask=inside, other=1.0)
    else:
        b = tl.sqrt_rn(tl.sum(squares, axis=1) + eps)
        # All blocks of a row have its norm: the first writes it.
        if KEEPS_NORM and block == 0:
            tl.store(norm_map + position, b, mask=inside)
    at = position[:, None] * filters + channel[None, :]
    mask = inside[:, None] & exists[None, :]
    if KEEPS_DOT:
        tl.store(dot + at, u, mask=mask)
    value = decoupled(
        u,
        b[:, None],
        a,
        bias,
        radius,
        mean,
        k,
        channel,
        exists,
        alpha,
        beta,
        power,
        floor,
        MAGNITUDE,
        ANGULAR,
        TIMES_A,
        PER_POSITION,
        RADIUS,
        HAS_MEAN,
        CURVATURE,
        HAS_BIAS,
        P,
        FILTERS,
        1,
    )
    tl.store(y + at, value, mask=mask)
