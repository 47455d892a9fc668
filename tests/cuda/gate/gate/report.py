"""Rows of the gate, the time they may take, and the report they end in."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, NOT_RUN = STATES = ("ok", "failed", "not run")

Figures = dict[str, Any]


class NotRun(Exception):  # noqa: N818
    """A check cannot be made here; the text says why."""


@dataclass
class Row:
    """One line of the report.

    Attributes:
        name: what was checked.
        state: one of ``STATES``.
        figures: what was measured, by name.
        seconds: how long it took.
        message: why it failed or did not run, or what there is to know.
    """

    name: str
    state: str
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""


class Budget:
    """The seconds a run may take, on a clock that tests replace."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        return self.seconds - self.spent()


def exit_code(rows: Sequence[Row]) -> int:
    """Return 0 if no row failed and at least one is ok."""
    states = [row.state for row in rows]
    return 0 if FAILED not in states and OK in states else 1


def slug(device: str) -> str:
    """Return a folder name for a device.

    Example:
        >>> slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def shown(value: Any) -> str:
    """Return a figure as it stands in the table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def write(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class Report:
    """All rows so far; every new one is on disk before the next begins.

    Args:
        folder: gets ``gpu-gate.json`` and ``gpu-gate.md``.
        environment: device, versions, commit.
        seen: called with every new row.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, Any],
        seen: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.json = folder / "gpu-gate.json"
        self.markdown = folder / "gpu-gate.md"
        self.environment = environment
        self.rows: list[Row] = []
        self.complete = False
        self._seen = seen

    def add(self, row: Row) -> None:
        """Append a row and write both files."""
        self.rows.append(row)
        self._seen(row)
        self.save()

    def keep_earlier(self, names: Sequence[str]) -> None:
        """Take rows that this run will not measure from a report of the same code and machine."""
        try:
            old = json.loads(self.json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        apart = {"date"}
        same = all(
            old["environment"].get(key) == value
            for key, value in self.environment.items()
            if key not in apart
        )
        if same and not self.environment.get("dirty"):
            self.rows = [Row(**row) for row in old["rows"] if row["name"] not in names]

    def save(self) -> None:
        text = json.dumps(
            {
                "environment": self.environment,
                "complete": self.complete,
                "rows": [_finite(asdict(row)) for row in self.rows],
            },
            indent=1,
        )
        write(self.json, text + "\n")
        write(self.markdown, self.text())

    def finish(self) -> int:
        """Mark the report complete and return the exit code."""
        self.complete = True
        self.save()
        return exit_code(self.rows)

    def text(self) -> str:
        """Return the report as Markdown."""
        counts = ", ".join(
            f"{sum(row.state == state for row in self.rows)} {state}" for state in STATES
        )
        lines = ["# GPU gate", ""]
        lines += [f"* {key}: {value}" for key, value in self.environment.items()]
        lines += ["", f"{counts}." + ("" if self.complete else " The run did not end."), ""]
        lines += ["| row | state | s | figures | message |", "| --- | --- | ---: | --- | --- |"]
        for row in self.rows:
            figures = ", ".join(f"{key} {shown(value)}" for key, value in row.figures.items())
            message = " ".join(row.message.replace("|", "\\|").split())
            state = row.state if row.state == OK else f"**{row.state}**"
            lines.append(f"| {row.name} | {state} | {row.seconds:.1f} | {figures} | {message} |")
        return "\n".join(lines) + "\n"
