"""Which plan to take where nothing was measured, and which of the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcconv.call.key import CUDA, INPUT_GRADIENT, TF32, TRITON, WEIGHT_GRADIENT, Key
from dcconv.passes.fused import STEM_CHANNELS

# Names of the plans: passes around the library convolution, one pass, cuDNN graph.
PLANS = ("A", "B", "G")
PASSES, ONE_PASS, GRAPH = PLANS

# The pass over the result that plan A has and plan B saves takes time in inverse proportion to
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

# A plan must be faster than plan A by more than this share to be taken: within it, two
# measurements of the same plan differ, and plan A has the fewest kernels to trust.
MARGIN = 0.02


def _depthwise(key: Key) -> bool:
    return key.c == key.groups > 1


def _summed(key: Key) -> int:
    """Return how many products a sum has; the gradient of the input sums over filters."""
    summed = key.o if key.direction == INPUT_GRADIENT else key.c
    return summed // key.groups * key.r * key.s


def _one_pass_on_cuda(key: Key) -> bool:
    channels, filters = key.c // key.groups, key.o // key.groups
    if _depthwise(key):
        return True
    if key.direction == WEIGHT_GRADIENT:
        return False
    pointwise = key.r == key.s == 1
    if pointwise and channels % CHANNEL_VECTOR == 0 and filters % CHANNEL_VECTOR == 0:
        return True
    if key.groups == 1 and channels <= STEM_CHANNELS:
        return True
    return _summed(key) <= SHORT_SUM


def _one_pass_in_triton(key: Key) -> bool:
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


_PREFERS_ONE_PASS = {CUDA: _one_pass_on_cuda, TRITON: _one_pass_in_triton}


def rule(key: Key, willing: Sequence[str]) -> str:
    """Return the plan that should be fastest, from reasoning alone.

    On the cuda backend depthwise layers, 1x1 layers whose channels and filters are multiples of 8,
    stems and sums of at most 600 products go to plan B; the others to plan G, else to plan A.

    On the triton backend plan B has depthwise layers, and in half precision ungrouped 1x1 layers
    and sums of at most 256 products in groups of at least 16 channels and filters; of float32
    layers without TF32 the depthwise ones alone, with it the ungrouped 1x1 layers too. Gradients
    of the input take it at stride 1. The others go to plan A.

    Args:
        key: the call; sizes of x do not matter.
        willing: names of the plans that can run it, at least one.
    """
    one_pass = _PREFERS_ONE_PASS[key.backend](key)
    order = (ONE_PASS, GRAPH, PASSES) if one_pass else (GRAPH, PASSES, ONE_PASS)
    return next(name for name in order if name in willing)


def fastest(times: Mapping[str, float], willing: Sequence[str]) -> str | None:
    """Return the measured choice, None if no willing plan was measured.

    Plan A wins unless another plan is faster by more than ``MARGIN``.

    Args:
        times: milliseconds by plan.
        willing: names of the plans that can run the call.
    """
    known = {name: times[name] for name in PLANS if name in willing and name in times}
    if not known:
        return None
    best = min(known, key=lambda name: known[name])
    close = PASSES in known and known[PASSES] * (1 - MARGIN) <= known[best]
    return PASSES if close else best
