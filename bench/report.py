"""Tables of measured rows, for the terminal (rich) and as Markdown, from the same cells."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import BOTH, FORWARD
from bench.memory import Kept
from bench.providers import COMPILED, CONV2D, DCCONV, EAGER, PROVIDERS
from bench.rows import LISTED, Row, means, verdicts

MARKS = {"yes": " !", "maybe": " ~", "no": "", "": ""}

SHORT_PASS = {FORWARD: "fwd", BOTH: "fwd+bwd"}

LEGEND = (
    "Layer: n,c,h,o,k. Times are medians in ms. Spread: the largest distance of the 20th and 80th "
    "percentile among the providers of the row, over the median. ! slower than that provider, "
    "~ slower by median but within the spread."
)

MEMORY_LEGEND = (
    "Bytes kept between forward and backward, parameters apart, as multiples of x + y. x, map: the "
    "shares of x, which every provider keeps unless marked -, and of the norm map; within: dcconv "
    "keeps at most x + y + map; chain: operator, BatchNorm, ReLU, within F.conv2d's chain + map."
)


class Grid(NamedTuple):
    """A table of text: titles, cells, and how many leading columns are names."""

    title: str
    header: list[str]
    cells: list[list[str]]
    names: int


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _milliseconds(row: Row, provider: str) -> str:
    result = row.results.get(provider)
    if result is None:
        return ""
    if result.timing is None:
        return (result.note or "").partition(":")[0]
    median = result.timing.median
    return _number(median, 0 if median >= 100 else 1 if median >= 10 else 2 if median >= 1 else 3)


def _against(row: Row, base: str) -> str:
    text = _number(row.ratio(DCCONV, base))
    return text + MARKS[row.slower(base)] if base != CONV2D else text


def _ordered(rows: Sequence[Row], worst: bool) -> list[Row]:
    if not worst:
        return list(rows)
    return sorted(rows, key=lambda row: -(row.ratio(DCCONV, CONV2D) or 0.0))


def _providers(rows: Sequence[Row]) -> list[str]:
    present = {name for row in rows for name in row.results}
    return [name for name in PROVIDERS if name in present]


def legend(rows: Sequence[Row]) -> str:
    """Return how to read the table of times."""
    whos = "; ".join(f"{name}: {PROVIDERS[name].title}" for name in _providers(rows))
    return f"{LEGEND} {whos}. /name: dcconv over that provider."


def time_grid(rows: Sequence[Row], worst: bool = False) -> Grid:
    """Return times and ratios, one line per row."""
    providers = _providers(rows)
    bases = [name for name in (CONV2D, EAGER, COMPILED) if name in providers]
    if DCCONV not in providers:
        bases = []
    header = ["layer", "operator", "mode", "dtype", "pass"]
    header += [*providers, *(f"/{name}" for name in bases), "spread"]
    cells = []
    for row in _ordered(rows, worst):
        case = row.case
        timings = [r.timing for r in row.results.values() if r.timing is not None]
        spread = max((timing.spread for timing in timings), default=None)
        cells.append(
            [case.layer.name, case.operator.name, case.mode, case.dtype, SHORT_PASS[row.which]]
            + [_milliseconds(row, name) for name in providers]
            + [_against(row, base) for base in bases]
            + ["" if spread is None else f"{100 * spread:.0f} %"]
        )
    return Grid("Time", header, cells, 5)


def mean_grid(rows: Sequence[Row]) -> Grid:
    """Return the geometric means and what they say about the targets."""
    others = [name for name in _providers(rows) if name not in (CONV2D, DCCONV)]
    header = ["dtype", "pass", "modes", "rows"]
    header += [f"{name} / conv2d" for name in others]
    header += ["dcconv / conv2d", "target", "verdict", "dcconv / eager", "dcconv / compiled"]
    cells = [
        [mean.dtype, SHORT_PASS[mean.which], mean.group, str(mean.rows)]
        + [_number(mean.over_conv2d.get(name)) for name in others]
        + [_number(mean.over_conv2d.get(DCCONV)), _number(mean.target), mean.verdict]
        + [_number(mean.over_eager), _number(mean.over_compiled)]
        for mean in means(rows)
    ]
    return Grid("Geometric means", header, cells, 3)


def memory_grid(rows: Sequence[Row]) -> Grid:
    """Return kept memory, one line per case."""
    providers = _providers(rows)
    header = ["layer", "operator", "mode", "dtype", "x+y MiB", "x", "map", *providers, "within"]
    header += [f"chain {name}" for name in (CONV2D, DCCONV) if name in providers]
    header += ["chain within"]
    cells = []
    for row in rows:
        if all(result.kept is None for result in row.results.values()):
            continue
        case, unit = row.case, row.x_bytes + row.y_bytes

        def multiple(kept: Kept | None, unit: int = unit) -> str:
            if kept is None:
                return ""
            return f"{kept.total / unit:.3f}" + ("" if kept.x else " -")

        answers = {True: "yes", False: "NO", None: ""}
        cells.append(
            [case.layer.name, case.operator.name, case.mode, case.dtype]
            + [f"{unit / 2**20:.1f}"]
            + [f"{own / unit:.3f}" for own in (row.x_bytes, row.map_bytes)]
            + [multiple(row.results[name].kept) for name in providers]
            + [answers[row.kept_within]]
            + [multiple(row.results[name].chain) for name in (CONV2D, DCCONV) if name in providers]
            + [answers[row.chain_within]]
        )
    return Grid("Memory kept for backward", header, cells, 4)


def error_grid(rows: Sequence[Row]) -> Grid:
    """Return the largest error of every provider, by dtype."""
    largest: dict[tuple[str, str, str], float] = {}
    for row in rows:
        for provider, result in row.results.items():
            for name, value in result.errors.items():
                key = (row.case.dtype, provider, name)
                largest[key] = max(value, largest.get(key, 0.0))
    names = list(dict.fromkeys(name for _, _, name in largest))
    pairs = list(dict.fromkeys((dtype, provider) for dtype, provider, _ in largest))
    cells = [
        [dtype, provider]
        + [
            f"{largest[(dtype, provider, name)]:.1e}" if (dtype, provider, name) in largest else ""
            for name in names
        ]
        for dtype, provider in pairs
    ]
    return Grid("Largest relative error", ["dtype", "provider", *names], cells, 2)


def notes(rows: Sequence[Row]) -> list[str]:
    """Return why times are missing: each reason once, with its first row; the first few only."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for provider, result in row.results.items():
            if result.note is not None:
                found.setdefault(f"{provider}: {result.note}", []).append(row.name)
    lines = [
        f"{reason} ({where[0]}{f' and {len(where) - 1} more rows' if len(where) > 1 else ''})"
        for reason, where in found.items()
    ]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"{len(lines) - LISTED} more reasons, all of them in the JSON lines."]
    return lines


def grids(rows: Sequence[Row], worst: bool = False) -> list[tuple[Grid, str]]:
    """Return every table that has lines, with the legend under it."""
    tables = [
        (time_grid(rows, worst), legend(rows)),
        (mean_grid(rows), ""),
        (memory_grid(rows), MEMORY_LEGEND),
        (error_grid(rows), ""),
    ]
    return [(grid, below) for grid, below in tables if grid.cells]


def show(console: Console, rows: Sequence[Row], worst: bool = False) -> None:
    """Print all tables and verdicts."""
    for grid, below in grids(rows, worst):
        table = Table(
            title=grid.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for at, title in enumerate(grid.header):
            is_name = at < grid.names
            table.add_column(title, justify="left" if is_name else "right", no_wrap=is_name)
        for cells in grid.cells:
            table.add_row(*cells)
        console.print(table)
        if below:
            console.print(below, style="dim", highlight=False)
    for line in (*verdicts(rows), *notes(rows)):
        console.print(line, markup=False, highlight=False)


def markdown(rows: Sequence[Row], protocol: str, worst: bool = False) -> str:
    """Return all tables and verdicts as Markdown, ready for a README."""
    parts = []
    if rows:
        parts += [rows[0].environment.sentence + ".", protocol]
    for grid, below in grids(rows, worst):
        rule = ["---"] * grid.names + ["---:"] * (len(grid.header) - grid.names)
        lines = [grid.header, rule, *grid.cells]
        parts.append(f"**{grid.title}**")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        if below:
            parts.append(below)
    found = [*verdicts(rows), *notes(rows)]
    parts.append("\n".join("* " + line.replace("\n", " ") for line in found))
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
