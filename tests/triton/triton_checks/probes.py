"""Kernels that do nothing but call the functions that the real ones are made of."""

import triton
import triton.language as tl

from dcconv.triton.kernels.functions import (
    angular_grad,
    angular_value,
    cosine_from,
    magnitude_grad,
    magnitude_value,
)
from dcconv.triton.kernels.tiles import lanes, offsets, place


@triton.jit
def magnitude_kernel(
    a, b, rho, out, count, alpha, beta, NAME: tl.constexpr, TIMES_A: tl.constexpr, B: tl.constexpr
):
    """h by value, then h, d, h_rho, h_a: [5, count]."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < count
    a = tl.load(a + i, mask=mask, other=1.0)
    b = tl.load(b + i, mask=mask, other=1.0)
    rho = tl.load(rho + i, mask=mask, other=1.0)
    value = magnitude_value(a, b, rho, alpha, beta, NAME)
    h, d, h_rho, h_a = magnitude_grad(a, b, rho, alpha, beta, NAME)
    if TIMES_A:
        value, h, d, h_rho, h_a = value * a, h * a, d * a, h_rho * a, h
    tl.store(out + i, value, mask=mask)
    tl.store(out + count + i, h, mask=mask)
    tl.store(out + 2 * count + i, d, mask=mask)
    tl.store(out + 3 * count + i, h_rho, mask=mask)
    tl.store(out + 4 * count + i, h_a, mask=mask)


@triton.jit
def angular_kernel(
    c, k, out, count, power, delta, NAME: tl.constexpr, INVERTIBLE: tl.constexpr, B: tl.constexpr
):
    """g by value, then g, g_c, e, g_k and c from g: [6, count]."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < count
    c = tl.load(c + i, mask=mask, other=0.0)
    k = tl.load(k + i, mask=mask, other=1.0)
    g, g_c, e, g_k = angular_grad(c, k, power, delta, NAME)
    tl.store(out + i, angular_value(c, k, power, NAME), mask=mask)
    tl.store(out + count + i, g, mask=mask)
    tl.store(out + 2 * count + i, g_c, mask=mask)
    tl.store(out + 3 * count + i, e, mask=mask)
    tl.store(out + 4 * count + i, g_k, mask=mask)
    if INVERTIBLE:
        tl.store(out + 5 * count + i, cosine_from(g, NAME), mask=mask)


@triton.jit
def offsets_kernel(
    out,
    tile,
    images,
    pixels,
    channels,
    chunks,
    LAST: tl.constexpr,
    P: tl.constexpr,
    IN_GROUP: tl.constexpr,
):
    """Offsets of the last channels of a tile of an ungrouped tensor; nothing is read there."""
    image, pixel, inside = place(tile, images, pixels, P, LAST)
    channel, exists, _ = lanes(chunks - 1, channels, 1, chunks, IN_GROUP, 1, False)
    at = offsets(image, pixel, channel, channels, pixels, LAST)
    at = tl.where(inside[:, None] & exists[None, :], at, -1)
    where = tl.arange(0, P)[:, None] * IN_GROUP + tl.arange(0, IN_GROUP)[None, :]
    tl.store(out + where, at)
