"""Where the elements of a tile lie: positions times lanes, in both layouts, without gaps.

A tile has P positions and LANES channels. In channels_last order a position is a pixel of any
image, in contiguous order one of a single image, so that neighbours are neighbours in memory. The
lanes are IN_GROUP channels of each of BY_GROUP groups: a wide group fills a tile or several, and
many narrow ones share one. Offsets are int64: tensors may have more than 2^31 elements.

Functions are handed values that go together as tuples. Not as named ones: Inductor writes a kernel
and its functions out without the classes that they name.
"""

import triton
import triton.language as tl


@triton.jit
def place(tile, images, pixels, P: tl.constexpr, LAST: tl.constexpr):
    """Image, pixels [P] and which of them exist; channels_last takes the batch as one image."""
    tile = tl.cast(tile, tl.int64)
    if LAST:
        image = tile * 0
        pixel = tile * P + tl.arange(0, P)
        inside = pixel < images * tl.cast(pixels, tl.int64)
    else:
        tiles = (pixels + P - 1) // P
        image = tile // tiles
        pixel = (tile - image * tiles) * P + tl.arange(0, P)
        inside = pixel < pixels
    return image, pixel, inside


@triton.jit
def offsets(image, pixel, channel, channels, pixels, LAST: tl.constexpr):
    """Offsets [P, n] of channels (or groups, in a map) at pixels."""
    if LAST:
        return pixel[:, None] * channels + channel[None, :]
    else:
        return (image * channels + channel[None, :]) * pixels + pixel[:, None]


@triton.jit
def within(image, pixel, channel, channels, pixels, LAST: tl.constexpr):
    """The same of pixels that are counted in their image, in both layouts."""
    if LAST:
        return (image * pixels + pixel)[:, None] * channels + channel[None, :]
    else:
        return offsets(image, pixel, channel, channels, pixels, False)


@triton.jit
def coordinates(image, pixel, pixels, width, LAST: tl.constexpr):
    """Image, row and column of pixels."""
    if LAST:
        image = pixel // pixels
        pixel = pixel - image * pixels
    row = pixel // width
    return image, row, pixel - row * width


@triton.jit
def lanes(
    chunk, per_group, groups, chunks,
    IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Channels of the lanes, which of them exist, and the groups [BY_GROUP].

    ``chunks`` is the number of tiles that share a group; EXACT: a group has IN_GROUP channels.
    """
    if BY_GROUP == 1:
        first = chunk // chunks
        lane = (chunk - first * chunks) * IN_GROUP + tl.arange(0, IN_GROUP)
        channel = first * per_group + lane
        inside = lane < per_group
    else:
        first = chunk * BY_GROUP
        lane = tl.arange(0, IN_GROUP * BY_GROUP)
        group = lane // IN_GROUP
        if EXACT:
            channel = first * IN_GROUP + lane
        else:
            channel = (first + group) * per_group + lane % IN_GROUP
        inside = (lane % IN_GROUP < per_group) & (first + group < groups)
    return channel, inside, first + tl.arange(0, BY_GROUP)


@triton.jit
def spread(by_group, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr):
    """[P, BY_GROUP] -> a tile that broadcasts with [P, LANES]."""
    if BY_GROUP == 1 or IN_GROUP == 1:
        return by_group
    else:
        wide = tl.broadcast_to(by_group[:, :, None], [P, BY_GROUP, IN_GROUP])
        return tl.reshape(wide, [P, BY_GROUP * IN_GROUP])


@triton.jit
def group_sums(tile, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr):
    """[P, LANES] -> sums over the lanes of each group, [P, BY_GROUP]."""
    if IN_GROUP == 1:
        return tile
    elif BY_GROUP == 1:
        return tl.sum(tile, axis=1)[:, None]
    else:
        return tl.sum(tl.reshape(tile, [P, BY_GROUP, IN_GROUP]), axis=2)


@triton.jit
def source(i, size, MODE: tl.constexpr):
    """The index that shows at index i of the padded axis, counted from the first; validity."""
    inside = (i >= 0) & (i < size)
    if MODE == "reflect":
        i = tl.where(i < 0, -i, tl.where(inside, i, 2 * (size - 1) - i))
        inside = i >= 0
    elif MODE == "replicate":
        i = tl.where(i < 0, 0, tl.where(inside, i, size - 1))
        inside = i >= 0
    elif MODE == "circular":
        i = tl.where(i < 0, i + size, tl.where(inside, i, i - size))
        inside = i >= 0
    return i, inside


@triton.jit
def window_norms(
    sums, positions, group, groups, size, steps, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    P: tl.constexpr, BY_GROUP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """b = sqrt(sum of the sums of squares in each window + eps), [P, BY_GROUP].

    ``positions`` are those of the result, ``size`` that of the images with the sums.
    """
    image, row, column, inside = positions
    height, width = size
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns = steps
    total = tl.zeros([P, BY_GROUP], tl.float32)
    pixels = height * width
    seen = inside[:, None] & (group < groups)[None, :]
    for r in range(ROWS):
        i, shown_row = source(row * stride_rows - top + r * dilation_rows, height, MODE)
        for s in tl.static_range(COLUMNS):
            j, shown = source(column * stride_columns - left + s * dilation_columns, width, MODE)
            pixel = i * width + j
            at = within(image, pixel, group, groups, pixels, LAST)
            total += tl.load(sums + at, mask=seen & (shown_row & shown)[:, None], other=0.0)
    return tl.sqrt_rn(total + eps)


@triton.jit
def showing(i, slot, before, after, size, MODE: tl.constexpr):
    """Number ``slot`` of the padded indices that show index i, and whether there is one.

    Slot 0 is the index itself. Replicated edges show in ``before`` and ``after`` more, reflected
    and circular ones in at most one each: slots 1 and 2.
    """
    own = i + before
    if MODE == "reflect":
        low = before - i
        high = before + 2 * (size - 1) - i
        index = tl.where(slot == 0, own, tl.where(slot == 1, low, high))
        low_shown = (i > 0) & (low >= 0)
        high_shown = (i < size - 1) & (high < before + size + after)
        shown = tl.where(slot == 0, i >= 0, tl.where(slot == 1, low_shown, high_shown))
    elif MODE == "circular":
        low = own - size
        high = own + size
        index = tl.where(slot == 0, own, tl.where(slot == 1, low, high))
        shown = (index >= 0) & (index < before + size + after)
    elif MODE == "replicate":
        index = tl.where(slot == 0, own, slot - 1)
        index = tl.where(slot > before, size + slot - 1, index)
        edge = tl.where(slot <= before, i == 0, i == size - 1)
        shown = tl.where(slot == 0, i >= 0, edge)
    else:
        index = own
        shown = i >= 0
    return index, shown
