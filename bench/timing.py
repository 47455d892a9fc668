"""The timing protocol, in one place; it knows nothing about convolution.

Candidates are timed in rounds. A round takes one sample of every candidate, in an order drawn anew
for each round from a fixed seed, so that slow drift of the machine and what the previous candidate
left in the caches fall on all of them alike. Before the first round every candidate is called
``warmup`` times. Rounds go on until both the number of rounds and the time spent in samples have
reached their minimum. Reported are the median and the 20th and 80th percentile; the garbage
collector is off meanwhile.

On a CPU a sample is one call on the wall clock, without the release of its results. On CUDA it is
the time between two events around the call; before it, a buffer of four times the L2 cache is read,
so that nothing of the operands is left in the cache, and a delay is queued, so that the host is
ahead and no launch is waited for, unless launches are to count: those of a whole network are a part
of its step. ``graphs`` replays a captured CUDA graph in place of the call.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A row stops here however short its samples are.
MAX_ROUNDS = 400

# Cycles of the delay before a sample on CUDA, two milliseconds or more: longer than the launches of
# a layer by plain PyTorch, forward and backward.
DELAY_CYCLES = 4_000_000

# A row is noisy where a median is uncertain by more than this share of itself.
NOISY = 0.10


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


@dataclass(frozen=True)
class Staged:
    """A call whose preparation is not timed: ``call(prepare())``, of which only ``call`` counts."""

    prepare: Callable[[], Any]
    call: Callable[[Any], object]


Candidate = Callable[[], object] | Staged


def uncertainty(median: float, low: float, high: float, rounds: float) -> float:
    """Return two standard errors of a median as a share of it.

    Of normal samples the 20th and 80th percentile lie 1.68 deviations apart, and the standard error
    of a median is 1.25 deviations over the root of their number.

    Example:
        >>> round(uncertainty(1.0, 0.9, 1.1, 9), 3)
        0.099
    """
    return 2 * 1.25 / 1.68 * (high - low) / (median * math.sqrt(rounds))


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


class Stopwatch:
    """Times calls on one device.

    Args:
        device: ``cpu`` or ``cuda``.
        graphs: on CUDA, capture every candidate once and time the replay.
        ahead: on CUDA, let the host run ahead, so that launches are not timed.
    """

    def __init__(self, device: str, graphs: bool = False, ahead: bool = True) -> None:
        self._device = device
        self._graphs = graphs
        self._ahead = ahead
        self._flush: Tensor | None = None
        if device == "cuda":
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.zeros(4 * cache, dtype=torch.uint8, device=device)

    def sample(self, candidate: Candidate) -> float:
        """Return the seconds of one call."""
        if isinstance(candidate, Staged):
            prepared = candidate.prepare()
            return self._sample(lambda: candidate.call(prepared))
        return self._sample(candidate)

    def _sample(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            del result
            return seconds
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: nothing is left to be written back during the sample.
        self._flush.max()
        if self._ahead:
            torch.cuda._sleep(DELAY_CYCLES)
        before.record()
        result = call()
        after.record()
        after.synchronize()
        del result
        return float(before.elapsed_time(after)) * 1e-3

    def _captured(self, candidate: Candidate) -> Candidate:
        if isinstance(candidate, Staged):
            raise NotImplementedError("dcconv: graphs must time whole calls, got a backward alone")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = candidate()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def interleave(
        self, candidates: Mapping[str, Candidate], protocol: Protocol
    ) -> dict[str, Timing]:
        """Time all candidates in one run, by the protocol at the top of this module."""
        calls = dict(candidates)
        for name, candidate in candidates.items():
            for _ in range(protocol.warmup):
                self.sample(candidate)
            if self._graphs and self._device == "cuda":
                calls[name] = self._captured(candidate)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
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
                    seconds = self.sample(calls[name])
                    samples[name].append(seconds)
                    spent += seconds
        finally:
            if collecting:
                gc.enable()
        return {name: summarise(values) for name, values in samples.items()}
