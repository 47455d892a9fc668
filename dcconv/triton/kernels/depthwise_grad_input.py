"""The gradient of the input of groups of one channel in one pass, its norms' part included."""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import coordinates, lanes, offsets, place, showing, within


@triton.jit
def depthwise_grad_input_kernel(
    grad_u, weight, x, t, norm_map, sigma, grad_x,
    images, pixels, groups, filters, chunks, all_chunks,
    height, width, out_rows, out_columns,
    stride_rows, stride_columns, top, bottom, left, right, dilation_rows, dilation_columns,
    slots, column_slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    WITH_MEAN: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, BY_GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of grad_x: sums over taps and a group's filters, and x times the taps' sum of t.

    WITH_MEAN: t + sigma / b in the place of t.
    """
    program = tl.program_id(0)
    tile = program // all_chunks
    chunk = program - tile * all_chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    channel, exists, group = lanes(chunk, 1, groups, chunks, 1, BY_GROUP, True)
    picture, row, column = coordinates(image, pixel, pixels, width, LAST)
    # Axes are shorter than images: strides divide what fits 32 bits.
    row = row.to(tl.int32)
    column = column.to(tl.int32)
    outputs = out_rows * out_columns
    mask = inside[:, None] & exists[None, :]
    if WITH_MEAN:
        of_mean = tl.load(sigma)
    total = tl.zeros([P, BY_GROUP], tl.float32)
    seen = tl.zeros([P, BY_GROUP], tl.float32)
    for slot in range(slots):
        row_slot = slot // column_slots
        i, shown = showing(row, row_slot, top, bottom, height, MODE)
        column_slot = slot - row_slot * column_slots
        j, column_shown = showing(column, column_slot, left, right, width, MODE)
        shown = shown & column_shown
        for r in range(ROWS):
            start = i - r * dilation_rows
            p = start // stride_rows
            in_rows = shown & (start >= 0) & (p * stride_rows == start) & (p < out_rows)
            for s in range(COLUMNS):
                begin = j - s * dilation_columns
                q = begin // stride_columns
                hit = in_rows & (begin >= 0) & (q * stride_columns == begin)
                hit_mask = mask & (hit & (q < out_columns))[:, None]
                output = p.to(tl.int64) * out_columns + q
                map_at = within(picture, output, group, groups, outputs, LAST)
                tap = tl.load(t + map_at, mask=hit_mask, other=0.0)
                if WITH_MEAN:
                    b = tl.load(norm_map + map_at, mask=hit_mask, other=1.0)
                    tap += tl.where(hit_mask, of_mean / b, 0.0)
                seen += tap
                for f in range(filters):
                    o = group * filters + f
                    at = within(picture, output, o, groups * filters, outputs, LAST)
                    du = tl.load(grad_u + at, mask=hit_mask, other=0.0).to(tl.float32)
                    w_at = o * (ROWS * COLUMNS) + (r * COLUMNS + s)
                    w = tl.load(weight + w_at, mask=exists, other=0.0).to(tl.float32)
                    total += du * w[None, :]
    at = offsets(image, pixel, channel, groups, pixels, LAST)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + at, total + value * seen, mask=mask)
