"""The main loop of the implicit GEMM: windows times filters, taps and channels as one sum.

Rows of the left matrix are windows, gathered as they are multiplied; its columns are the taps and
channels of a window. Forward gathers from x, the gradient of the input from the gradient of u.
"""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import source


@triton.jit
def product(
    gathered, weight, positions, size, row_step, column_step, own, lane, exists,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    DENSE: tl.constexpr, FLAT: tl.constexpr, SQUARES: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCASTS: tl.constexpr,
    P: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums [P, LANES] of products and, with SQUARES, sums [P] of the windows' squares, else zeros.

    Tap (r, s) of a window is the pixel (row + r row_step, column + s column_step) of an image of a
    ``size``, with the channels of its ``own`` group. ``weight`` is that of the group: its lanes are
    filters or, TRANSPOSED, its channels, and then its filters are the gathered channels. DENSE:
    windows are pixels. FLAT: a step of the loop takes DEPTH elements of windows, taps included,
    where a tap has too few channels to fill it. UPCASTS: products in float32, for the interpreter,
    which multiplies the bits of bfloat16.
    """
    TAPS: tl.constexpr = ROWS * COLUMNS
    image, pixel, row, column, inside = positions
    height, width = size
    group, groups, channels, lanes = own
    inputs = height * width
    if LAST:
        base = image * inputs * (groups * channels) + group * channels
        pixel_stride = groups * channels
    else:
        # All positions of a tile are of one image.
        base = pixel * 0 + (image * groups + group) * channels * inputs
        pixel_stride = 1
    # Of a weight [filters, rows, columns, channels], or [filters, channels, rows, columns].
    if TRANSPOSED:
        lane_at = lane if LAST else lane * TAPS
        tap_stride = lanes if LAST else 1
        channel_stride = lanes * TAPS
    else:
        lane_at = lane * (channels * TAPS)
        tap_stride = channels if LAST else 1
        channel_stride = 1 if LAST else TAPS
    sums = tl.zeros([P, LANES], tl.float32)
    squares = tl.zeros([P], tl.float32)
    if FLAT:
        steps = tl.cdiv(TAPS * channels, DEPTH)
    else:
        per_tap = tl.cdiv(channels, DEPTH)
        steps = TAPS * per_tap
    for step in range(steps):
        if FLAT:
            element = step * DEPTH + tl.arange(0, DEPTH)
            there = element < TAPS * channels
            if LAST:
                tap = element // channels
                channel = element - tap * channels
            else:
                channel = element // TAPS
                tap = element - channel * TAPS
            r = tap // COLUMNS
            s = tap - r * COLUMNS
            i, shown_row = source(row[:, None] + (r * row_step)[None, :], height, MODE)
            j, shown = source(column[:, None] + (s * column_step)[None, :], width, MODE)
            mask = inside[:, None] & there[None, :] & shown_row & shown
            at = base[:, None] + (i * width + j) * pixel_stride
            # Elements of a filter are in order.
            weight_at = tap * tap_stride + channel * channel_stride if TRANSPOSED else element
        else:
            tap = step // per_tap
            channel = (step - tap * per_tap) * DEPTH + tl.arange(0, DEPTH)
            there = channel < channels
            if DENSE:
                mask = inside[:, None] & there[None, :]
                at = (base + pixel * pixel_stride)[:, None]
            else:
                r = tap // COLUMNS
                s = tap - r * COLUMNS
                i, shown_row = source(row + r * row_step, height, MODE)
                j, shown = source(column + s * column_step, width, MODE)
                mask = (inside & shown_row & shown)[:, None] & there[None, :]
                at = (base + (i * width + j) * pixel_stride)[:, None]
            weight_at = tap * tap_stride + channel * channel_stride
        at = at + (channel if LAST else channel.to(tl.int64) * inputs)[None, :]
        left = tl.load(gathered + at, mask=mask, other=0.0)
        right = tl.load(
            weight + weight_at[:, None] + lane_at[None, :],
            mask=there[:, None] & exists[None, :],
            other=0.0,
        )
        if SQUARES:
            value = left.to(tl.float32)
            squares += tl.sum(value * value, axis=1)
        if UPCASTS:
            sums = tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums, squares


@triton.jit
def share(groups, lanes, LANES: tl.constexpr):
    """Tile of positions, group, first lane and lanes of a program. Neighbours share positions."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(lanes, LANES)
    tile = program // (groups * blocks)
    rest = program - tile * (groups * blocks)
    group = rest // blocks
    first = (rest - group * blocks) * LANES
    return tile, group, first, first + tl.arange(0, LANES)
