"""Times functions on a GPU: by events, warm, in turns, the median."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

# Milliseconds per call of a function.
Stopwatch: TypeAlias = Callable[[Callable[[], object]], float]

WARM_UP = 3
ROUNDS = 7
# Calls between two events, so that launching them is hidden as it is in a network.
CALLS = 5


def cuda_events(run: Callable[[], object]) -> float:
    """Return milliseconds per call on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS


def compare(runs: Mapping[str, Callable[[], object]], stopwatch: Stopwatch) -> dict[str, float]:
    """Return the median time of each function; they take turns, so that all see the same clocks."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            samples[name].append(stopwatch(run))
    return {name: statistics.median(found) for name, found in samples.items()}
