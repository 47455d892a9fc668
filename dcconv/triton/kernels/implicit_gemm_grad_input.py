"""The gradient of the input at stride 1 in one pass: an implicit GEMM that ends with + x t.

The left matrix is gathered from the gradient of u, in windows that run backwards; the right one is
the weight, its filters summed over.
"""

import triton
import triton.language as tl

from dcconv.triton.kernels.product import product, share
from dcconv.triton.kernels.tiles import coordinates, offsets, place


@triton.jit(do_not_specialize=["bucket"])
def implicit_gemm_grad_input_kernel(
    grad_u, weight, x, t, norm_map, sigma, grad_x,
    images, pixels, groups, filters, channels,
    out_rows, out_columns, width, top, left, dilation_rows, dilation_columns,
    bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DENSE: tl.constexpr,
    FLAT: tl.constexpr, WITH_MEAN: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCASTS: tl.constexpr,
    P: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile [P, LANES] of grad_x: sums over taps and filters, and x times the taps' sum of t.

    ``pixels`` and ``width`` are those of x, ``channels`` and ``filters`` those of a group.
    WITH_MEAN: t + sigma / b in the place of t. ``bucket`` as in the forward kernel.
    """
    tile, group, _, lane = share(groups, channels, LANES)
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    exists = lane < channels
    if DENSE:
        picture = image
        row = pixel
        column = pixel
    else:
        picture, row, column = coordinates(image, pixel, pixels, width, LAST)
    of_group = weight + group * filters * channels * (ROWS * COLUMNS)
    ends = (picture, pixel, row + top, column + left, inside)
    size = (out_rows, out_columns)
    own = (group, groups, filters, channels)
    value, _ = product(
        grad_u, of_group, ends, size, -dilation_rows, -dilation_columns, own, lane, exists,
        True, ROWS, COLUMNS, "zeros", DENSE, FLAT, False, LAST, PRECISION, UPCASTS,
        P, LANES, DEPTH,
    )  # fmt: skip
    outputs = out_rows * out_columns
    seen = tl.zeros([P], tl.float32)
    for r in range(ROWS):
        p = row + top - r * dilation_rows
        for s in tl.static_range(COLUMNS):
            q = column + left - s * dilation_columns
            if DENSE:
                output = pixel
                hit = inside
            else:
                output = p * out_columns + q
                hit = inside & (p >= 0) & (p < out_rows) & (q >= 0) & (q < out_columns)
            if LAST:
                map_at = (picture * outputs + output) * groups + group
            else:
                map_at = (picture * groups + group) * outputs + output
            tap = tl.load(t + map_at, mask=hit, other=0.0)
            if WITH_MEAN:
                b = tl.load(norm_map + map_at, mask=hit, other=1.0)
                tap += tl.where(hit, tl.load(sigma) / b, 0.0)
            seen += tap
    channel = group * channels + lane
    at = offsets(image, pixel, channel, groups * channels, pixels, LAST)
    mask = inside[:, None] & exists[None, :]
    value += tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * seen[:, None]
    tl.store(grad_x + at, value, mask=mask)
