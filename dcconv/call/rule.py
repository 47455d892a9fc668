"""Which strategy to take where nothing was measured, and which of the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcconv.call.key import INPUT_GRADIENT, TF32, WEIGHT_GRADIENT, Key
from dcconv.passes.fused import STEM_CHANNELS

#: The strategies, the same on every backend: the library convolution between fused passes, one
#: pass, a cuDNN graph.
STRATEGIES = ("library", "fused", "graph")
LIBRARY, FUSED, GRAPH = STRATEGIES

# The pass over the result that library has and fused saves takes time in inverse proportion to
# the length of the sums, C R S: below this it is a third of the convolution or more.
SHORT_SUM = 600
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


def prefers_fused_on_cuda(key: Key) -> bool:
    """Return whether one pass should be the fastest of the compiled kernels.

    It should for depthwise layers, 1x1 layers whose channels and filters are multiples of 8, and
    sums of at most 600 products, but not for stems.
    """
    channels, filters = key.c // key.groups, key.o // key.groups
    if _depthwise(key):
        return True
    if key.direction == WEIGHT_GRADIENT:
        return False
    if key.groups == 1 and channels <= STEM_CHANNELS:
        return False
    pointwise = key.r == key.s == 1
    if pointwise and channels % CHANNEL_VECTOR == 0 and filters % CHANNEL_VECTOR == 0:
        return True
    return _summed(key) <= SHORT_SUM


def prefers_fused_in_triton(key: Key) -> bool:
    """Return whether one pass should be the fastest of Triton's kernels.

    It should for depthwise layers, and in half precision for ungrouped 1x1 layers and sums of at
    most 256 products in groups of at least 16 channels and filters; of float32 layers without TF32
    for the depthwise ones alone, with it for the ungrouped 1x1 layers too; in the gradient of the
    input at stride 1 only.
    """
    if _depthwise(key):
        return True
    if key.direction == WEIGHT_GRADIENT:
        return False
    if key.direction == INPUT_GRADIENT and key.stride != (1, 1):
        return False
    pointwise = key.groups == key.r == key.s == 1
    if key.dtype not in HALF:
        return key.dtype == TF32 and pointwise
    narrow = key.groups > 1 and min(key.c, key.o) < PRODUCT_TILE * key.groups
    return pointwise or (_summed(key) <= TRITON_SHORT_SUM and not narrow)


def rule(prefers_fused: bool, willing: Sequence[str]) -> str:
    """Return the strategy that should be fastest, from reasoning alone.

    Args:
        prefers_fused: whether one pass should be faster than the others: what the backend says of
            the call. Else graph should be, and then library.
        willing: names of the strategies that can run the call, at least one.
    """
    order = (FUSED, GRAPH, LIBRARY) if prefers_fused else (GRAPH, LIBRARY, FUSED)
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
