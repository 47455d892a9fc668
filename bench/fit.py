"""Least squares in log-log: how fast a time grows with a factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A standard error above this leaves even the first digit after the point open.
POOR_ERROR = 0.1


class Fit(NamedTuple):
    """An exponent p of y = constant * x^p.

    Attributes:
        exponent: the slope of log y over log x.
        error: its standard error, None of two points, which every line meets.
        r2: share of the variance of log y that the line explains; 1 where there is none.
        points: how many there were.
    """

    exponent: float
    error: float | None
    r2: float
    points: int

    @property
    def poor(self) -> bool:
        """Whether the points are not on one line, or too few to tell."""
        return self.error is None or self.error > POOR_ERROR


def fit(points: Iterable[tuple[float, float]]) -> Fit | None:
    """Fit a power law to points (x, y) above 0; None where fewer than two x differ.

    Example:
        >>> found = fit([(1, 3.0), (2, 12.0), (4, 48.0)])
        >>> round(found.exponent, 12), found.poor
        (2.0, False)
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    count = len(logs)
    if len({x for x, _ in logs}) < 2:
        return None
    middle_x = sum(x for x, _ in logs) / count
    middle_y = sum(y for _, y in logs) / count
    square = sum((x - middle_x) ** 2 for x, _ in logs)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in logs) / square
    rest = sum((y - middle_y - slope * (x - middle_x)) ** 2 for x, y in logs)
    total = sum((y - middle_y) ** 2 for _, y in logs)
    error = math.sqrt(rest / (count - 2) / square) if count > 2 else None
    return Fit(slope, error, 1.0 - rest / total if total > 0 else 1.0, count)


class Scaled(NamedTuple):
    """One number of threads: how much faster than one, and that over the number."""

    threads: int
    speed_up: float
    efficiency: float


def speed_ups(points: Sequence[tuple[int, float]]) -> list[Scaled]:
    """Return speed-up and parallel efficiency of points (threads, time); empty without one thread.

    Example:
        >>> speed_ups([(1, 8.0), (4, 4.0)])[1]
        Scaled(threads=4, speed_up=2.0, efficiency=0.5)
    """
    alone = dict(points).get(1)
    if alone is None:
        return []
    return [Scaled(threads, alone / time, alone / time / threads) for threads, time in points]
