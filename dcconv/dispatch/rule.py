"""Which plan to take where nothing was measured, and which of the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcconv.dispatch.key import INPUT_GRADIENT, WEIGHT_GRADIENT, Key
from dcconv.plan_b import STEM_CHANNELS

# Names of the plans: passes around the library convolution, one pass, cuDNN graph.
PLANS = ("A", "B", "G")
PASSES, ONE_PASS, GRAPH = PLANS

# The pass over the result that plan A has and plan B saves takes time in inverse proportion to
# the length of the sums, C R S: below this it is a third of the convolution or more.
SHORT_SUM = 600
CHANNEL_VECTOR = 8

# A plan must be faster than plan A by more than this share to be taken: within it, two
# measurements of the same plan differ, and plan A has the fewest kernels to trust.
MARGIN = 0.02


def _prefers_one_pass(key: Key) -> bool:
    channels, filters = key.c // key.groups, key.o // key.groups
    if channels == 1 and key.groups > 1:
        return True
    if key.direction == WEIGHT_GRADIENT:
        return False
    taps = key.r * key.s
    if taps == 1 and channels % CHANNEL_VECTOR == 0 and filters % CHANNEL_VECTOR == 0:
        return True
    if key.groups == 1 and channels <= STEM_CHANNELS:
        return True
    # The gradient of the input sums over filters.
    summed = filters if key.direction == INPUT_GRADIENT else channels
    return summed * taps <= SHORT_SUM


def rule(key: Key, willing: Sequence[str]) -> str:
    """Return the plan that should be fastest, from reasoning alone.

    Depthwise layers, 1x1 layers whose channels and filters are multiples of 8, stems and sums of
    at most 600 products go to plan B; the others to plan G, else to plan A.

    Args:
        key: the call; sizes of x do not matter.
        willing: names of the plans that can run it, at least one.
    """
    order = (ONE_PASS, GRAPH, PASSES) if _prefers_one_pass(key) else (GRAPH, PASSES, ONE_PASS)
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
