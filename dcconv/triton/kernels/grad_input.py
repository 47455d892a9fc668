"""The pass that finishes dx = fold(library gradient of the padded input) + x S.

S is the transposed window sum of what the output positions say about the norms of their windows.
"""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import coordinates, lanes, offsets, place, showing, spread, within


@triton.jit
def grad_input_kernel(
    library_grad, x, t, norm_map, sigma, grad_x,
    images, pixels, groups, per_group, chunks, all_chunks,
    height, width, out_rows, out_columns,
    stride_rows, stride_columns, top, bottom, left, right, dilation_rows, dilation_columns,
    row_slots, column_slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    TAP: tl.constexpr, LIBRARY: tl.constexpr,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of grad_x.

    TAP: ``plain`` t, ``with_mean`` t + sigma / b, ``over_norm`` t / b. LIBRARY: the gradient is
    ``none``, of x's size (``same``), or of the ``padded`` input.
    """
    program = tl.program_id(0)
    tile = program // all_chunks
    chunk = program - tile * all_chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    channel, exists, group = lanes(chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    channels = groups * per_group
    at = offsets(image, pixel, channel, channels, pixels, LAST)
    mask = inside[:, None] & exists[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([P, IN_GROUP * BY_GROUP], tl.float32)
    if LIBRARY == "same":
        total += tl.load(library_grad + at, mask=mask, other=0.0).to(tl.float32)
    if TAP == "with_mean":
        of_mean = tl.load(sigma)
    picture, row, column = coordinates(image, pixel, pixels, width, LAST)
    outputs = out_rows * out_columns
    padded_width = width + left + right
    padded_pixels = (height + top + bottom) * padded_width
    seen = tl.zeros([P, BY_GROUP], tl.float32)
    map_mask = inside[:, None] & (group < groups)[None, :]
    for row_slot in range(row_slots):
        i, row_shown = showing(row, row_slot, top, bottom, height, MODE)
        for column_slot in range(column_slots):
            j, column_shown = showing(column, column_slot, left, right, width, MODE)
            shown = row_shown & column_shown
            if LIBRARY == "padded":
                padded = i * padded_width + j
                from_at = within(picture, padded, channel, channels, padded_pixels, LAST)
                folded = tl.load(library_grad + from_at, mask=mask & shown[:, None], other=0.0)
                total += folded.to(tl.float32)
            for r in range(ROWS):
                start = i - r * dilation_rows
                p = start // stride_rows
                in_rows = shown & (start >= 0) & (p * stride_rows == start) & (p < out_rows)
                for s in tl.static_range(COLUMNS):
                    begin = j - s * dilation_columns
                    q = begin // stride_columns
                    hit = in_rows & (begin >= 0) & (q * stride_columns == begin)
                    hit = hit & (q < out_columns)
                    output = p * out_columns + q
                    map_at = within(picture, output, group, groups, outputs, LAST)
                    hit_mask = map_mask & hit[:, None]
                    tap = tl.load(t + map_at, mask=hit_mask, other=0.0)
                    if TAP != "plain":
                        b = tl.load(norm_map + map_at, mask=hit_mask, other=1.0)
                        if TAP == "with_mean":
                            tap += tl.where(hit_mask, of_mean / b, 0.0)
                        else:
                            tap = tap / b
                    seen += tap
    total += value * spread(seen, P, IN_GROUP, BY_GROUP)
    tl.store(grad_x + at, total, mask=mask)
