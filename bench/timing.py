"""The timing protocol, in one place; it knows nothing about convolution.

Candidates are timed in rounds. A round takes one sample of every candidate, in an order drawn anew
for each round from a fixed seed, so that slow drift of the machine and what the previous candidate
left in the caches fall on all of them alike. Before the first round every candidate is called
``warmup`` times. Rounds go on until both the number of rounds and the time spent in samples have
reached their minimum. A sample is one call on the wall clock, without the release of its results;
the garbage collector is off meanwhile. Reported are the median and the 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A row stops here however short its samples are.
MAX_ROUNDS = 400


@dataclass(frozen=True)
class Protocol:
    """How long to measure.

    Attributes:
        rounds: least number of rounds.
        min_time: least time spent in the samples of all candidates together, seconds.
        warmup: calls of every candidate before the first round.
    """

    rounds: int = 7
    min_time: float = 0.7
    warmup: int = 1


@dataclass(frozen=True)
class Timing:
    """What was measured of one candidate, milliseconds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the 20th and the 80th percentile, as a share of the median."""
        return (self.high - self.low) / self.median


def summarise(samples: list[float]) -> Timing:
    """Return the median and the 20th and 80th percentile of samples in seconds.

    Example:
        >>> summarise([0.001, 0.002, 0.003, 0.004, 0.005])
        Timing(median=3.0, low=1.8, high=4.2, rounds=5)
    """
    if len(samples) == 1:
        only = samples[0] * 1e3
        return Timing(only, only, only, 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(
        median=round(statistics.median(samples) * 1e3, 6),
        low=round(fifths[0] * 1e3, 6),
        high=round(fifths[3] * 1e3, 6),
        rounds=len(samples),
    )


def interleave(
    candidates: Mapping[str, Callable[[], object]], protocol: Protocol
) -> dict[str, Timing]:
    """Time all candidates in one run, by the protocol at the top of this module."""
    for call in candidates.values():
        for _ in range(protocol.warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    spent = 0.0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(MAX_ROUNDS):
            if not order or (done >= protocol.rounds and spent >= protocol.min_time):
                break
            shuffle(order)
            for name in order:
                call = candidates[name]
                start = time.perf_counter()
                result = call()
                seconds = time.perf_counter() - start
                del result
                samples[name].append(seconds)
                spent += seconds
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}
