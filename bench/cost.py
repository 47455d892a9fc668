"""What a row must do at least, and how fast the machine could do it: the roofline."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.layers import Layer
from bench.options import BACKWARD, BOTH, DTYPES, FORWARD
from bench.timing import Protocol, Stopwatch
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import is_norm_free


class Cost(NamedTuple):
    """The least work of a pass: floating-point operations and bytes to and from memory."""

    flops: int
    bytes: int


def cost(case: Case, which: str) -> Cost:
    """Return the least work of a pass, the same for every provider.

    FLOPs, a multiplication and an addition counting one each:
        forward: 2 n o p q (c / groups) r s of the convolution, and 2 for every square of x;
        backward: twice the convolution, for the gradients of x and weight.
    What a function of c or b costs is not counted: it is a few operations per output. Products with
    padding are, as is usual: where they are many (a large dilation on a small image) a library that
    leaves them out can pass the roofline.

    Bytes, every tensor once, in its dtype; the norm map in the dtype of norms:
        forward: x and weight read, y written, and where a backward follows the map written;
        backward: dy, y (or u), x, weight and the map read, dx and dweight written.
    Of x only pixels that lie in a patch are squared and read. An operator whose patch norm cancels
    has no squares and no map, and its backward does not read y. Numbers per filter and intermediate
    results are not counted: an operator in one pass has none.
    """
    layer, dtype = case.layer, DTYPES[case.dtype]
    x, weight, y = (math.prod(s) for s in (layer.x_shape, layer.weight_shape, layer.y_shape))
    n, _, p, q = layer.y_shape
    read = n * layer.c * rows_read(layer) ** 2
    convolution = 2 * y * layer.patch_size
    squares, norm_map, kept = 2 * read, n * layer.groups * p * q * compute_dtype(dtype).itemsize, y
    if is_norm_free(case.operator.magnitude, case.operator.angular, "none"):
        squares = norm_map = kept = 0
    size = dtype.itemsize
    forward = Cost(convolution + squares, (read + weight + y) * size)
    backward = Cost(2 * convolution, (read + x + 2 * weight + y + kept) * size + norm_map)
    if which == FORWARD:
        return forward
    if which == BACKWARD:
        return backward
    assert which == BOTH
    return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes + norm_map)


def rows_read(layer: Layer) -> int:
    """Return how many rows of the input lie in a patch: where a stride leaves gaps, not all do.

    Example:
        >>> rows_read(Layer(8, 64, 56, 128, 1, stride=2)), rows_read(Layer(8, 64, 56, 128, 3, 2))
        (28, 56)
    """
    first = [at * layer.stride - layer.padding for at in range(layer.y_shape[2])]
    touched = {at + tap * layer.dilation for at in first for tap in range(layer.k)}
    return len(touched & set(range(layer.size)))


class Ceilings(NamedTuple):
    """What the machine reaches: bytes per second of a copy, FLOP per second of products."""

    copy_rate: float
    matrix_rate: float

    def floor(self, work: Cost) -> float:
        """Return the least milliseconds that the two rates allow for some work."""
        return 1e3 * max(work.bytes / self.copy_rate, work.flops / self.matrix_rate)


# Bytes of the array that is copied, far beyond any last-level cache, and the side of the matrices.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_DEEP = {"cpu": Layer(32, 384, 8, 384, 3), "cuda": Layer(128, 512, 28, 512, 3)}


def measure_ceilings(dtype: str, device: str, quick: bool = False) -> Ceilings:
    """Measure the copy rate and the matrix rate of a dtype on this machine.

    The copy reads and writes one large array. The matrix rate is that of a product of two square
    matrices or of a deep 3x3 convolution, whichever is higher: libraries have different kernels for
    the two, and on some processors the convolution's are better. All are the 20th percentile of the
    rounds: a ceiling is what the machine can do, not what it does when disturbed.
    """
    kind = DTYPES[dtype]
    source = torch.ones(_COPY_BYTES[device] // kind.itemsize, dtype=kind, device=device)
    target = torch.empty_like(source)
    side = _MATRIX_SIDE[device] // (2 if quick else 1)
    left = torch.randn(side, side, device=device).to(kind)
    right = torch.randn(side, side, device=device).to(kind)
    deep = _DEEP[device]
    x = torch.randn(deep.x_shape, device=device).to(kind, memory_format=torch.channels_last)
    weight = torch.randn(deep.weight_shape, device=device)
    weight = weight.to(kind, memory_format=torch.channels_last)
    watch = Stopwatch(device)
    rounds = 3 if quick else 7
    timings = watch.interleave(
        {
            "copy": lambda: target.copy_(source),
            "matrix": lambda: left @ right,
            "convolution": lambda: F.conv2d(x, weight, padding=deep.padding),
        },
        Protocol(rounds, 0.0, warmup=2),
    )
    # Counted as in cost(): products with padding are products.
    products = 2 * math.prod(deep.y_shape) * deep.patch_size
    moved = 2 * source.numel() * kind.itemsize
    return Ceilings(
        copy_rate=moved / timings["copy"].low * 1e3,
        matrix_rate=max(2 * side**3 / timings["matrix"].low, products / timings["convolution"].low)
        * 1e3,
    )
