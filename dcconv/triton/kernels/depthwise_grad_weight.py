"""du and x -> partial sums of dw, in groups of one channel; ``column_sums_kernel`` adds them."""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import coordinates, lanes, offsets, place, source, spread, within


@triton.jit
def depthwise_grad_weight_kernel(
    grad_u, x, parts,
    images, pixels, groups, per_group, chunks, all_chunks,
    tiles, per_part,
    height, width, columns,
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns,
    tap_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    TAPS: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr,
    IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A row of ``parts``, [rows, filters, taps]: TAPS taps of a chunk of lanes.

    The row's tiles of positions are ``per_part`` neighbours, whose windows overlap in the cache.
    """
    LANES: tl.constexpr = IN_GROUP * BY_GROUP
    program = tl.program_id(0)
    # Programs that read the same are neighbours.
    share = program // tap_blocks
    first = (program - share * tap_blocks) * TAPS
    part = share // all_chunks
    chunk = share - part * all_chunks
    channel, exists, group = lanes(chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    filters = groups * per_group
    inputs = height * width
    # Per element: added up over the tile only at the end.
    sums = (tl.zeros([P, LANES], tl.float32),) * TAPS
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        image, pixel, inside = place(tile, images, pixels, P, LAST)
        picture, row, column = coordinates(image, pixel, pixels, columns, LAST)
        # Axes are shorter than images.
        row = row.to(tl.int32) * stride_rows - top
        column = column.to(tl.int32) * stride_columns - left
        at = offsets(image, pixel, channel, filters, pixels, LAST)
        du = tl.load(grad_u + at, mask=inside[:, None] & exists[None, :], other=0.0)
        du = du.to(tl.float32)
        seen = inside[:, None] & (group < groups)[None, :]
        added = ()
        for tap in tl.static_range(TAPS):
            # Beyond the window the last tap again, which is not stored.
            own = tl.minimum(first + tap, ROWS * COLUMNS - 1)
            r = own // COLUMNS
            s = own - r * COLUMNS
            i, shown_row = source(row + r * dilation_rows, height, MODE)
            j, shown = source(column + s * dilation_columns, width, MODE)
            pixel = i.to(tl.int64) * width + j
            at = within(picture, pixel, group, groups, inputs, LAST)
            value = tl.load(x + at, mask=seen & (shown_row & shown)[:, None], other=0.0)
            value = spread(value.to(tl.float32), P, IN_GROUP, BY_GROUP)
            added += (sums[tap] + du * value,)  # type: ignore[assignment]
        sums = added
    at = (part.to(tl.int64) * filters + channel) * (ROWS * COLUMNS) + first
    for tap in tl.static_range(TAPS):
        if first + tap < ROWS * COLUMNS:
            tl.store(parts + (at + tap), tl.sum(sums[tap], axis=0), mask=exists)
