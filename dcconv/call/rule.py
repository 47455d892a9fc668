"""Which strategy to take where nothing was measured, and which of the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcconv.call.key import INPUT_GRADIENT, TF32, WEIGHT_GRADIENT, Key
from dcconv.passes.fused import STEM_CHANNELS

#: The strategies, the same on every backend: the library convolution between fused passes, one
#: pass, a cuDNN graph.
STRATEGIES = ("library", "fused", "graph")
LIBRARY, FUSED, GRAPH = STRATEGIES

#: What to take first, among those that can run a call: one pass before all others, a cuDNN graph
#: and then one pass, or the library before one pass.
Order = tuple[str, ...]
FUSED_FIRST: Order = (FUSED, GRAPH, LIBRARY)
FUSED_SECOND: Order = (GRAPH, FUSED, LIBRARY)
FUSED_LAST: Order = (GRAPH, LIBRARY, FUSED)

# The pass over the result that library has and fused saves takes time in inverse proportion to
# the length of the sums, C R S: below this it is a third of the convolution or more.
SHORT_SUM = 600
# Up to here the implicit GEMM is predicted to take 0.84 to 1.16 of library's time on an H200, and
# 0.50 to 0.85 on A100 and RTX 4090 (bench/results/machine); beyond it loses 7 to 10 % on an H200.
LONG_SUM = 2400
CHANNEL_VECTOR = 8

# The implicit GEMM of the triton backend runs at 0.57 to 0.74 of the library's convolution. Without
# the pass over the result that is a tie at 0.54 to 0.58 where sums have 256 products, and takes
# 0.72 to 0.76 where they have 576: published rates and arithmetic, for bfloat16 on one H200.
TRITON_SHORT_SUM = 256
# tl.dot multiplies tiles of 16 rows and columns at least: narrower groups waste what they lack.
PRODUCT_TILE = 16
HALF = ("float16", "bfloat16")

# A strategy must be faster than library by more than this share to be taken: within it, two
# measurements of the same strategy differ, and library has the fewest kernels to trust.
MARGIN = 0.02


def _depthwise(key: Key) -> bool:
    return key.c == key.groups > 1


def _summed(key: Key) -> int:
    """Return how many products a sum has; the gradient of the input sums over filters."""
    summed = key.o if key.direction == INPUT_GRADIENT else key.c
    return summed // key.groups * key.r * key.s


def order_on_cuda(key: Key) -> Order:
    """Return the order in which to take what can run a call on the cuda backend.

    One pass comes first for depthwise layers, 1x1 layers whose channels and filters are multiples
    of 8, and sums of at most 600 products; behind a cuDNN graph alone for sums of at most 2,400 in
    half precision with such channels and filters; never for stems.
    """
    channels, filters = key.c // key.groups, key.o // key.groups
    if _depthwise(key):
        return FUSED_FIRST
    if key.direction == WEIGHT_GRADIENT or (key.groups == 1 and channels <= STEM_CHANNELS):
        return FUSED_LAST
    vectors = channels % CHANNEL_VECTOR == filters % CHANNEL_VECTOR == 0
    summed = _summed(key)
    if (vectors and key.r == key.s == 1) or summed <= SHORT_SUM:
        return FUSED_FIRST
    return FUSED_SECOND if vectors and key.dtype in HALF and summed <= LONG_SUM else FUSED_LAST


def order_in_triton(key: Key) -> Order:
    """Return the order in which to take what can run a call on the triton backend.

    One pass comes first for depthwise layers, and in half precision for ungrouped 1x1 layers and
    sums of at most 256 products in groups of at least 16 channels and filters; of float32 layers
    without TF32 for the depthwise ones alone, with it for the ungrouped 1x1 layers too; in the
    gradient of the input at stride 1 only.
    """
    if _depthwise(key):
        return FUSED_FIRST
    if key.direction == WEIGHT_GRADIENT:
        return FUSED_LAST
    if key.direction == INPUT_GRADIENT and key.stride != (1, 1):
        return FUSED_LAST
    pointwise = key.groups == key.r == key.s == 1
    if key.dtype not in HALF:
        return FUSED_FIRST if key.dtype == TF32 and pointwise else FUSED_LAST
    narrow = key.groups > 1 and min(key.c, key.o) < PRODUCT_TILE * key.groups
    short = _summed(key) <= TRITON_SHORT_SUM and not narrow
    return FUSED_FIRST if pointwise or short else FUSED_LAST


def rule(order: Order, willing: Sequence[str]) -> str:
    """Return the strategy that should be fastest, from reasoning alone.

    Args:
        order: in which to take them, as the backend says of the call.
        willing: names of the strategies that can run the call, at least one.
    """
    return next(name for name in order if name in willing)


def fastest(times: Mapping[str, float], willing: Sequence[str]) -> str | None:
    """Return the measured choice, None if no willing strategy was measured.

    library wins unless another strategy is faster by more than ``MARGIN``.

    Args:
        times: milliseconds by strategy.
        willing: names of the strategies that can run the call.
    """
    known = {name: times[name] for name in STRATEGIES if name in willing and name in times}
    if not known:
        return None
    best = min(known, key=lambda name: known[name])
    close = LIBRARY in known and known[LIBRARY] * (1 - MARGIN) <= known[best]
    return LIBRARY if close else best
