"""Kernels of the norms: sums of squares per pixel, norms of windows, norms of filters."""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import coordinates, group_sums, lanes, offsets, place, window_norms


@triton.jit
def pixel_sumsq_kernel(
    x, sums,
    images, pixels, groups, per_group, chunks, group_chunks,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """x -> sum of squares over the channels of a group, per pixel."""
    program = tl.program_id(0)
    tile = program // group_chunks
    first = (program - tile * group_chunks) * chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    squares = tl.zeros([P, IN_GROUP * BY_GROUP], tl.float32)
    for chunk in range(chunks):
        channel, exists, _ = lanes(
            first + chunk, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT
        )
        at = offsets(image, pixel, channel, groups * per_group, pixels, LAST)
        mask = inside[:, None] & exists[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        squares += value * value
    _, _, group = lanes(first, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    at = offsets(image, pixel, group, groups, pixels, LAST)
    mask = inside[:, None] & (group < groups)[None, :]
    tl.store(sums + at, group_sums(squares, P, IN_GROUP, BY_GROUP), mask=mask)


@triton.jit
def window_norm_kernel(
    sums, b, partial,
    images, pixels, groups, group_chunks,
    height, width, columns,
    stride_rows, stride_columns, top, left, dilation_rows, dilation_columns,
    eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr,
    SUMS: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, BY_GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of squares -> b and, with SUMS, its sum per program in float64."""
    program = tl.program_id(0)
    tile = program // group_chunks
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    group = (program - tile * group_chunks) * BY_GROUP + tl.arange(0, BY_GROUP)
    picture, row, column = coordinates(image, pixel, pixels, columns, LAST)
    positions = (picture, row, column, inside)
    steps = (stride_rows, stride_columns, top, left, dilation_rows, dilation_columns)
    norm = window_norms(
        sums, positions, group, groups, (height, width), steps, eps,
        ROWS, COLUMNS, MODE, P, BY_GROUP, LAST,
    )  # fmt: skip
    mask = inside[:, None] & (group < groups)[None, :]
    tl.store(b + offsets(image, pixel, group, groups, pixels, LAST), norm, mask=mask)
    if SUMS:
        there = tl.where(mask, norm, 0.0).to(tl.float64)
        tl.store(partial + program, tl.sum(tl.sum(there, axis=1), axis=0))


@triton.jit
def finish_mean(partial, mean, partials, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, partials, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < partials, other=0.0)
    tl.store(mean, (tl.sum(total, axis=0) / count).to(tl.float32))


@triton.jit
def filter_norm(
    norms, first,
    SCALES: tl.constexpr, DIVIDES: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight, a, scaled, filters, size, alpha, eps = norms
    o = first + tl.arange(0, FILTERS)
    exists = (o < filters)[:, None]
    row = (o * size)[:, None]
    squares = tl.zeros([FILTERS, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = (start + tl.arange(0, BLOCK))[None, :]
        value = tl.load(weight + row + i, mask=exists & (i < size), other=0.0).to(tl.float32)
        squares += value * value
    norm = tl.sqrt_rn(tl.sum(squares, axis=1) + eps)
    tl.store(a + o, norm, mask=o < filters)
    if SCALES:
        factor = (alpha / norm if DIVIDES else tl.zeros_like(norm) + alpha)[:, None]
        for start in range(0, size, BLOCK):
            i = (start + tl.arange(0, BLOCK))[None, :]
            mask = exists & (i < size)
            value = tl.load(weight + row + i, mask=mask, other=0.0).to(tl.float32)
            tl.store(scaled + row + i, value * factor, mask=mask)


@triton.jit
def filter_norm_kernel(
    weight, a, scaled, partial, mean,
    filters, size, partials, count, alpha, eps,
    MEAN: tl.constexpr, SCALES: tl.constexpr, DIVIDES: tl.constexpr,
    FILTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a of FILTERS filters and, with SCALES, alpha weight (over a with DIVIDES).

    With MEAN the first program finishes the mean norm instead.
    """
    program = tl.program_id(0).to(tl.int64)
    norms = (weight, a, scaled, filters, size, alpha, eps)
    if MEAN:
        program -= 1
        if program < 0:
            finish_mean(partial, mean, partials, count, BLOCK)
        else:
            filter_norm(norms, program * FILTERS, SCALES, DIVIDES, FILTERS, BLOCK)
    else:
        filter_norm(norms, program * FILTERS, SCALES, DIVIDES, FILTERS, BLOCK)
