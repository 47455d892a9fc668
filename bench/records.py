"""Result files: one JSON line per measured row, appended when the row is done.

A line has ``kind`` (the sub-command), ``row`` (what was measured: plain names and numbers, the
row's identity), ``results`` (by provider, with ``timing`` in milliseconds or a ``note`` why there
is none, and more by kind), ``facts`` (what holds for the whole row) and ``environment``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environment import Environment
from bench.timing import NOISY, uncertainty


@dataclass
class Record:
    """One line of a result file; see the top of this module."""

    kind: str
    row: dict[str, Any]
    results: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The row's identity as text: equal in two files where the same thing was measured."""
        return " ".join((self.kind, *(str(value) for value in self.row.values())))

    def timing(self, provider: str) -> dict[str, float] | None:
        """Return ``median``, ``low``, ``high`` in ms and ``rounds`` of a provider, if any."""
        found: dict[str, float] | None = self.results.get(provider, {}).get("timing")
        return found

    def median(self, provider: str) -> float | None:
        """Return a provider's median in milliseconds, None where it has none."""
        timing = self.timing(provider)
        return None if timing is None else float(timing["median"])

    def ratio(self, provider: str, base: str) -> float | None:
        """Return a provider's median over another's, or None where one of them has none."""
        above, below = self.median(provider), self.median(base)
        return None if above is None or not below else above / below

    @property
    def spread(self) -> float | None:
        """The largest distance of the 20th and 80th percentile over the median, of any provider."""
        timings = [r["timing"] for r in self.results.values() if r.get("timing")]
        return max(((t["high"] - t["low"]) / t["median"] for t in timings), default=None)

    @property
    def noisy(self) -> bool:
        """Whether the median of a provider is uncertain by more than 10 % (two standard errors)."""
        timings = [r["timing"] for r in self.results.values() if r.get("timing")]
        return any(uncertainty(**timing) > NOISY for timing in timings)

    @property
    def wrong(self) -> list[str]:
        """The providers whose results broke the accuracy rule."""
        return [n for n, r in self.results.items() if str(r.get("note", "")).startswith("wrong")]


def plain(value: Any) -> Any:
    """Return a value as JSON has it; numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def append(path: Path, record: Record, at: Environment) -> None:
    """Append one record as a line that reaches the disk before the next row begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record.environment = plain(at)
    line = json.dumps(plain(dataclasses.asdict(record)), allow_nan=False)
    # A line that an earlier interruption left unfinished must not swallow this one.
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Return the records of a file; other lines are reported with file and line, and skipped.

    Raises:
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            value = json.loads(line)
            record = Record(**value)
            parts = (record.row, record.results, record.facts, record.environment)
            if not (isinstance(record.kind, str) and all(isinstance(p, dict) for p in parts)):
                raise TypeError("kind must be text and all else an object")
            for result in record.results.values():
                timing = result.get("timing")
                if timing is None:
                    continue
                low, median, high = (float(timing[name]) for name in ("low", "median", "high"))
                if not 0 < low <= median <= high < math.inf:
                    raise ValueError("a timing must have 0 < low <= median <= high < inf")
                if not timing["rounds"] >= 1:
                    raise ValueError("a timing must have rounds of at least 1")
        # Of brackets nested too deep, too.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            print(f"{path}:{number}: not a result row ({error}), skipped", file=sys.stderr)
            continue
        found.append(record)
    return found


def latest(records: Iterable[Record]) -> list[Record]:
    """Return the last record of every row, in the order of their first appearance."""
    found: dict[str, Record] = {}
    for record in records:
        found[record.key] = record
    return list(found.values())


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean, or None of nothing.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    if not values:
        return None
    return math.exp(sum(math.log(value) for value in values) / len(values))
