"""Compare two result files row by row: what became slower, larger or wrong.

A and B are result files, or folders of them; the latest record of every row counts. A provider's
row has regressed if its median in B is above that in A by more than the threshold and the intervals
of the 20th to 80th percentile are disjoint; if bytes kept for backward, alone or in a chain, or the
peak grew by more than the threshold; or if it had a time in A and is wrong or failed in B. The exit
status is 1 if a provider of dcconv has regressed in any row, and 0 otherwise. What the same
comparison says of the library's own convolution, which no change here can move, is the drift of the
machine; --normalise divides it out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.records import Record, geometric_mean, latest, read
from bench.tables import milliseconds
from dcconv.operator.checks import number, value_error

THRESHOLD = 0.10

#: Rows printed beyond the regressed ones.
SHOWN = 20

#: Providers that hold no code of this project, by which the machine's drift is judged.
BASELINES = ("conv2d", "plain")

OURS = "dcconv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="result file or folder: before")
    add("b", type=Path, metavar="B", help="result file or folder: after")
    add("--threshold", type=float, default=THRESHOLD, help="share a median may grow by (0.10)")
    add("--provider", metavar="NAME", help="compare this provider only")
    add("--normalise", action="store_true", help="divide times by the machine's drift")
    add("--rows", type=int, default=SHOWN, help=f"rows shown beside regressed ones ({SHOWN})")
    add("--unmatched", action="store_true", help="list the rows that only one side has")


class Change(NamedTuple):
    """What became of one provider in one row.

    Attributes:
        key: of the row.
        provider: name.
        before: timing in A, None without.
        after: timing in B, None without.
        ratio: of the medians, B over A, the drift divided out where that was asked for.
        causes: why it has regressed, in words; empty if it has not.
        lost: why it has no time in B where it had one in A, without being wrong.
        noisy: whether the row is noisy in A or B.
    """

    key: str
    provider: str
    before: dict[str, float] | None
    after: dict[str, float] | None
    ratio: float | None
    causes: list[str]
    lost: str | None
    noisy: bool

    @property
    def ours(self) -> bool:
        """Whether the exit status depends on it."""
        return self.provider.startswith(OURS)


def load(path: Path) -> list[Record]:
    """Return the latest records of a result file, or of every file of a folder.

    Raises:
        ValueError: there is no such file, or no row in it.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise value_error("A and B", "be result files or folders that have some", repr(str(path)))
    found = latest(record for file in files for record in read(file))
    if not found:
        raise value_error("A and B", "have result rows", repr(str(path)))
    return found


def drift(pairs: Iterable[tuple[Record, Record]]) -> float | None:
    """Return the geometric mean of B over A of the medians of baselines, None without any."""
    ratios = []
    for a, b in pairs:
        for name in BASELINES:
            before, after = a.median(name), b.median(name)
            if before is not None and after is not None:
                ratios.append(after / before)
    return geometric_mean(ratios)


def _sizes(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("kept", "chain", "peak"):
        value = result.get(name)
        if isinstance(value, dict):
            value = value.get("total")
        if value is not None:
            yield name, float(value)


def _grown(a: dict[str, Any], b: dict[str, Any], threshold: float) -> list[str]:
    after = dict(_sizes(b))
    return [
        f"{name} {old:.0f} -> {after[name]:.0f} bytes"
        for name, old in _sizes(a)
        if name in after and after[name] > old * (1 + threshold)
    ]


def change(a: Record, b: Record, provider: str, threshold: float, scale: float = 1.0) -> Change:
    """Compare one provider in a row of A and of B, whose times are divided by ``scale``."""
    before, after = a.timing(provider), b.timing(provider)
    results = a.results[provider], b.results[provider]
    note = str(results[1].get("note") or "")
    causes, ratio, lost = [], None, None
    if before is not None and after is not None:
        ratio = after["median"] / before["median"] / scale
        if ratio > 1 + threshold and after["low"] / scale > before["high"]:
            causes.append("slower")
    elif before is not None:
        if note.startswith(("wrong", "failed")):
            causes.append(note)
        else:
            lost = note or "not measured"
    causes += _grown(*results, threshold)
    return Change(a.key, provider, before, after, ratio, causes, lost, a.noisy or b.noisy)


def changes(
    pairs: Iterable[tuple[Record, Record]],
    threshold: float = THRESHOLD,
    provider: str | None = None,
    scale: float = 1.0,
) -> list[Change]:
    """Compare every provider of every common row, worst first: no time, then by ratio."""
    found = [
        change(a, b, name, threshold, scale)
        for a, b in pairs
        for name in a.results
        if name in b.results and provider in (None, name)
    ]

    def order(c: Change) -> tuple[bool, bool, float, str, str]:
        gone = bool(c.causes) and c.after is None
        return not (c.ours and c.causes), not gone, -(c.ratio or 0.0), c.key, c.provider

    return sorted(found, key=order)


def _verdict(c: Change) -> str:
    if c.causes:
        return ("" if c.ours else "(not ours) ") + "; ".join(c.causes)
    if c.lost is not None:
        return f"no time: {c.lost}"
    return ""


def _table(found: Sequence[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", overflow="fold")
    table.add_column("provider", no_wrap=True)
    for title in ("A ms", "B ms", "B / A"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("regressed", overflow="fold")
    for c in found:
        times = [milliseconds(t["median"]) if t else "-" for t in (c.before, c.after)]
        ratio = "-" if c.ratio is None else f"{c.ratio:.3f}" + (" †" if c.noisy else "")
        table.add_row(c.key, c.provider, *times, ratio, _verdict(c))
    return table


def _devices(records: Iterable[Record]) -> set[str]:
    return {str(r.environment.get("device")) for r in records}


def run(options: argparse.Namespace, console: Console) -> int:
    """Print what changed, worst first; return 1 if a provider of dcconv has regressed."""
    number("--threshold", options.threshold, "be a number of at least 0", 0.0, closed=True)
    number("--rows", options.rows, "be a number of at least 0", 0, closed=True)
    sides = [{r.key: r for r in load(path)} for path in (options.a, options.b)]
    pairs = [(a, sides[1][key]) for key, a in sides[0].items() if key in sides[1]]
    if not pairs:
        raise value_error("A and B", "have a row in common", f"{options.a} and {options.b}")
    known = list(dict.fromkeys(name for a, b in pairs for name in a.results if name in b.results))
    if options.provider is not None and options.provider not in known:
        rule = f"be one of {', '.join(known)}"
        raise value_error("--provider", rule, repr(options.provider))
    moved = drift(pairs)
    if options.normalise and moved is None:
        rule = f"go with rows that have one of {', '.join(BASELINES)}"
        raise value_error("--normalise", rule, "none")
    scale = moved if options.normalise and moved is not None else 1.0

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False)

    devices = [_devices(side.values()) for side in sides]
    if devices[0] != devices[1]:
        names = " and ".join(", ".join(sorted(each)) for each in devices)
        say(f"A and B are from different devices: {names}.", "yellow")
    found = changes(pairs, options.threshold, options.provider, scale)
    regressed = [c for c in found if c.causes and c.ours]
    console.print(_table(found[: len(regressed) + options.rows]))
    hidden = len(found) - len(regressed) - options.rows
    if hidden > 0:
        say(f"{hidden} more lines, none of them a regression of dcconv; --rows shows them.")
    say(f"{len(pairs)} rows in common, {len(found)} times compared.")
    for name, side, other in (("A", *sides), ("B", *reversed(sides))):
        only = [key for key in side if key not in other]
        if only:
            say(f"{len(only)} rows only in {name}{':' if options.unmatched else '.'}")
            for key in only if options.unmatched else ():
                say(f"  {key}")
    if noisy := sum(c.noisy for c in found):
        say(f"† noisy in A or B: {noisy} of {len(found)}.")
    if lost := [c for c in found if c.lost is not None and c.ours]:
        say(f"{len(lost)} times of dcconv in A have none in B: {lost[0].lost}.", "yellow")
    if moved is not None:
        divided = ", divided out" if options.normalise else ""
        say(f"Drift of the machine (baselines, B over A): {moved:.3f}{divided}.")
    if regressed:
        say(f"{len(regressed)} regressions of dcconv beyond {options.threshold:.0%}.", "bold red")
        return 1
    say(f"No regression of dcconv beyond {options.threshold:.0%}.", "bold green")
    return 0
