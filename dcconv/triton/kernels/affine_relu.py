"""Kernel of the affine map of channels with a ReLU, which finds the squared norms of its result."""

import triton
import triton.language as tl

from dcconv.triton.kernels.tiles import group_sums, lanes, offsets, place


@triton.jit
def affine_relu_kernel(
    x, scale, shift, y, sums,
    images, pixels, groups, per_group, chunks, group_chunks,
    LAST: tl.constexpr, P: tl.constexpr, IN_GROUP: tl.constexpr, BY_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """y = max(0, x scale + shift), and the sum of its squares over the channels of a group."""
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
        factor = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
        # Lanes without a channel are 0, and so are their squares.
        value = value * factor + tl.load(shift + channel, mask=exists, other=0.0)[None, :]
        # NaN is not below 0 and stays.
        value = tl.where(value < 0.0, 0.0, value).to(y.dtype.element_ty)
        tl.store(y + at, value, mask=mask)
        rounded = value.to(tl.float32)
        squares += rounded * rounded
    _, _, group = lanes(first, per_group, groups, chunks, IN_GROUP, BY_GROUP, EXACT)
    at = offsets(image, pixel, group, groups, pixels, LAST)
    mask = inside[:, None] & (group < groups)[None, :]
    tl.store(sums + at, group_sums(squares, P, IN_GROUP, BY_GROUP), mask=mask)
