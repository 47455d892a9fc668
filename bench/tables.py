"""What a run of ``ops`` prints at its end: times and ratios, rates and memory, means, notes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.providers import COMPILED, CONV2D, EAGER, OURS, PROVIDERS
from bench.records import Record, geometric_mean

# Longest list of reasons and of rows in a sentence.
LISTED = 6

LEGEND = (
    "Times are medians in ms. Spread: the largest distance of the 20th and 80th percentile among "
    "the providers of the row, over the median; * noisy: a median uncertain by more than 10 %. "
    "/name: dcconv over it; "
    "! slower than it, ~ slower by median but within the spread."
)

RATES_LEGEND = (
    "GB/s and TFLOP/s of dcconv for the least work of the row (bench/cost.py); roofline: the least "
    "time by the measured copy and matrix rates over dcconv's. Kept: between forward and backward, "
    "parameters apart, as multiples of x + y; chain: with BatchNorm and ReLU; within: at most "
    "x + y + map, and the chain at most F.conv2d's + map."
)


class Grid(NamedTuple):
    """A table of text: titles, cells, and how many leading columns are names."""

    title: str
    header: list[str]
    cells: list[list[str]]
    names: int


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with some digits, nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    """Return a time with three digits or so."""
    return number(value, 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3)


def first_own(results: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the provider of ours that a user gets: the first that does not refuse the row."""
    ours = [name for name in results if name.startswith(OURS)]
    runs = [n for n in ours if not str(results[n].get("note") or "").startswith("missing")]
    return next(iter(runs or ours), None)


def own_of(record: Record) -> str | None:
    """Return the provider of ours that a user gets, if it is in the row."""
    own = record.facts.get("own")
    return str(own) if own in record.results else None


def slower(record: Record, base: str) -> str:
    """Say whether ours is slower than another provider.

    Returns:
        ``yes`` where the intervals of the 20th to 80th percentile are disjoint too, ``maybe`` where
        only the median is above, ``no`` else, and "" where one has no timing.
    """
    name = own_of(record)
    own, other = record.timing(name) if name else None, record.timing(base)
    if own is None or other is None:
        return ""
    if own["median"] <= other["median"]:
        return "no"
    return "yes" if own["low"] > other["high"] else "maybe"


def own_ratio(record: Record, base: str) -> float | None:
    """Return ours over another provider."""
    own = own_of(record)
    return None if own is None else record.ratio(own, base)


def time_cell(record: Record, provider: str) -> str:
    """Return a provider's time, its error where it is wrong, or the kind of reason for neither."""
    result = record.results.get(provider)
    if result is None:
        return ""
    median = record.median(provider)
    if median is not None:
        return milliseconds(median)
    note = str(result.get("note") or "")
    if note.startswith("wrong") and result.get("errors"):
        tensor, value = max(result["errors"].items(), key=lambda item: _sortable(item[1]))
        return f"{tensor} {'inf' if value is None else f'{value:.1e}'}"
    return note.partition(":")[0]


def _sortable(value: float | None) -> float:
    return float("inf") if value is None else value


def _ordered(records: Sequence[Record], worst: bool) -> list[Record]:
    if not worst:
        return list(records)
    return sorted(records, key=lambda record: -badness(record, own_ratio(record, CONV2D)))


def badness(record: Record, ratio: float | None) -> float:
    """Return what worst rows are sorted by: a wrong row is worse than any slow one."""
    return math.inf if record.wrong else ratio or 0.0


def differs(records: Iterable[Record], name: str) -> bool:
    """Whether rows differ in a part of their identity."""
    return len({str(record.row.get(name)) for record in records}) > 1


def row_names(records: Sequence[Record]) -> list[str]:
    """Return what tells rows apart: layout and threads only where they differ."""
    names = ["layer", "operator", "mode", "dtype", "pass"]
    return names + [n for n in ("layout", "threads", "graphs") if differs(records, n)]


def _identity(record: Record, names: Sequence[str]) -> list[str]:
    return [str(record.row.get(name)) for name in names]


def mean_by_layer(
    records: Iterable[Record], ratio: Callable[[Record], float | None]
) -> float | None:
    """Return the geometric mean over layers of the geometric mean over each layer's rows.

    Some layers are measured with more operators and modes; they count no more than the others.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        value = ratio(record)
        if value is not None:
            found.setdefault(str(record.row.get("layer")), []).append(value)
    means = (geometric_mean(values) for values in found.values())
    return geometric_mean([mean for mean in means if mean is not None])


def time_grid(records: Sequence[Record], worst: bool = False) -> Grid:
    """Return times and ratios, one line per row."""
    present = {name for record in records for name in record.results}
    providers = [name for name in PROVIDERS if name in present]
    bases = [name for name in (CONV2D, EAGER, COMPILED) if name in providers]
    marks = {"yes": " !", "maybe": " ~", "no": "", "": ""}
    names = row_names(records)
    cells = []
    for record in _ordered(records, worst):
        ratios = [
            number(own_ratio(record, base))
            + ("" if base == CONV2D else marks[slower(record, base)])
            for base in bases
        ]
        spread = record.spread
        text = "" if spread is None else f"{100 * spread:.0f} %" + ("*" if record.noisy else "")
        cells.append(
            _identity(record, names)
            + [time_cell(record, name) for name in providers]
            + [*ratios, text]
        )
    header = [*names, *providers, *(f"/{base}" for base in bases), "spread"]
    return Grid("Time", header, cells, len(names))


def within(record: Record) -> str:
    """Say whether ours keeps at most x + y + map, and in a chain F.conv2d's + map."""
    own = record.results.get(own_of(record) or "", {})
    facts = record.facts
    kept, chain = own.get("kept"), own.get("chain")
    base = record.results.get(CONV2D, {}).get("chain")
    if kept is None:
        return ""
    # A few numbers per filter and scalars: BatchNorm keeps two per filter, the radius is one more.
    small = 8 * facts["filters"] + 64
    fits = kept["total"] <= facts["x_bytes"] + facts["y_bytes"] + facts["map_bytes"] + small
    if chain is not None and base is not None:
        fits = fits and chain["total"] <= base["total"] + facts["map_bytes"] + small
    return "yes" if fits else "NO"


def rate_grid(records: Sequence[Record], worst: bool = False) -> Grid:
    """Return rates, share of the roofline and memory, one line per row."""
    names = row_names(records)
    cells = []
    for record in _ordered(records, worst):
        own = record.results.get(own_of(record) or "", {})
        base = record.results.get(CONV2D, {})
        unit = record.facts["x_bytes"] + record.facts["y_bytes"]

        def multiple(result: dict[str, Any], which: str, unit: int = unit) -> str:
            kept = result.get(which)
            return "" if kept is None else f"{kept['total'] / unit:.2f}"

        cells.append(
            _identity(record, names)
            + [number(own.get("gbps"), 1), number(own.get("tflops"), 3)]
            + [number(own.get("roofline"))]
            + [number(None if r.get("peak") is None else r["peak"] / 2**20, 1) for r in (own, base)]
            + [multiple(own, "kept"), multiple(base, "kept")]
            + [multiple(own, "chain"), multiple(base, "chain"), within(record)]
        )
    header = [*names, "GB/s", "TFLOP/s", "roofline", "peak MiB", "conv2d", "kept", "conv2d"]
    header += ["chain", "conv2d", "within"]
    return Grid("Rates and memory of dcconv", header, cells, len(names))


def mean_grid(records: Sequence[Record]) -> Grid:
    """Return geometric means of the ratios, by class and by what rows of a layer differ in."""
    names = [n for n in row_names(records) if n not in ("layer", "operator", "mode")]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        for name in record.facts.get("classes", ()):
            groups.setdefault((name, *_identity(record, names)), []).append(record)
    bases = (CONV2D, EAGER, COMPILED)
    cells = [
        [*key, str(len(chosen))]
        + [number(mean_by_layer(chosen, functools.partial(own_ratio, base=b))) for b in bases]
        + [str(sum(slower(record, COMPILED) == "yes" for record in chosen))]
        for key, chosen in groups.items()
    ]
    header = ["class", *names, "rows", *(f"/{b}" for b in bases), "slower than compiled"]
    return Grid("Geometric means of dcconv over others", header, cells, 1 + len(names))


def notes(records: Sequence[Record]) -> list[str]:
    """Return why times are missing: each reason once, with its first row; the first few only."""
    found: dict[str, list[str]] = {}
    for record in records:
        for provider, result in record.results.items():
            if result.get("note"):
                found.setdefault(f"{provider}: {result['note']}", []).append(record.key)
    lines = [
        f"{reason} ({where[0]}{f' and {len(where) - 1} more rows' if len(where) > 1 else ''})"
        for reason, where in found.items()
    ]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"{len(lines) - LISTED} more reasons, all of them in the result file."]
    noisy = sum(record.noisy for record in records)
    if noisy:
        lines.append(f"{noisy} of {len(records)} rows are noisy: measure them again, alone.")
    return lines


def print_grid(console: Console, grid: Grid, below: str = "") -> None:
    """Print one table."""
    table = Table(
        title=grid.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for at, title in enumerate(grid.header):
        is_name = at < grid.names
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True)
    for cells in grid.cells:
        table.add_row(*cells)
    console.print(table)
    if below:
        console.print(below, style="dim", highlight=False)


def show(console: Console, records: Sequence[Record], worst: bool = False) -> None:
    """Print all tables of a run."""
    if not records:
        return
    print_grid(console, time_grid(records, worst), LEGEND)
    print_grid(console, rate_grid(records, worst), RATES_LEGEND)
    print_grid(console, mean_grid(records))
    for line in notes(records):
        console.print(line, markup=False, highlight=False)
