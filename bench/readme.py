"""Markdown of a device's results, and the text between the markers of README and docs.

A marked part begins with the line ``<!-- bench NAME: begin -->`` and ends with the line
``<!-- bench NAME: end -->``; ``TABLES`` lists the names. The charts show what the functions here
return, so that a figure and the table beside it agree.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.fit import fit
from bench.layers import CLASSES, OPERATOR, layer_classes
from bench.machine.tables import machine_tables
from bench.options import BOTH, DTYPES, FORWARD, LAYOUTS, PASSES
from bench.providers import COMPILED, COMPILED_EAGER, CONV2D, EAGER, FORMULA, PROVIDERS
from bench.records import Record, geometric_mean
from bench.tables import (
    differs,
    mean_by_layer,
    milliseconds,
    number,
    own_of,
    own_ratio,
    row_names,
    slower,
    time_cell,
)
from bench.timing import NOISY as UNCERTAIN
from dcconv.operator.checks import value_error

#: Latest records of a device, by kind.
Results = Mapping[str, Sequence[Record]]

#: What a provider is called in a sentence.
TITLES = {
    CONV2D: "`F.conv2d`",
    EAGER: "eager reference",
    FORMULA: "best-written formula",
    COMPILED_EAGER: "compiled reference",
    COMPILED: "compiled formula",
}

#: Largest geometric mean of dcconv over F.conv2d, by dtype and pass, modes fixed and no-rho.
TARGETS = {
    ("float32", FORWARD): 1.10,
    ("float32", BOTH): 1.20,
    ("bfloat16", FORWARD): 1.6,
    ("bfloat16", BOTH): 1.6,
}

#: What the targets are stated for.
TARGET_LAYOUT, TARGET_THREADS = "channels_last", 2

NOISY = "†"

# Rows of a list that are seen at once; the rest is there to be opened. The library wins most rows,
# since it does less.
OPEN_ROWS, OPEN_LOSSES = 20, 5


class Setting(NamedTuple):
    """What the rows of one table or figure have in common."""

    dtype: str
    layout: str
    threads: int
    which: str | None


def beaten(record: Record, base: str) -> bool:
    """Whether a provider is faster than dcconv beyond the spread of both."""
    return slower(record, base) == "yes"


def mean_over(records: Iterable[Record], base: str) -> float | None:
    """Return the geometric mean of dcconv's medians over a provider's."""
    return geometric_mean([ratio for r in records if (ratio := own_ratio(r, base)) is not None])


def class_mean(records: Iterable[Record], base: str) -> float | None:
    """Return the mean of a class: every layer counts once, whatever it is measured with."""
    return mean_by_layer(records, functools.partial(own_ratio, base=base))


def classes_of(record: Record) -> list[str]:
    """Return the classes that a row's layer belongs to."""
    return [str(name) for name in record.facts.get("classes", ())]


def by_class(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the rows of each class, in the order of the classes."""
    records = list(records)
    found = dict.fromkeys((*CLASSES, *(name for r in records for name in classes_of(r))))
    rows = {name: [r for r in records if name in classes_of(r)] for name in found}
    return {name: chosen for name, chosen in rows.items() if chosen}


def by_layer(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the rows of each layer."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(str(record.row.get("layer")), []).append(record)
    return found


def _at(known: Iterable[str], name: str) -> int:
    known = list(known)
    return known.index(name) if name in known else len(known)


def settings(
    records: Iterable[Record], passes: bool = True, threads: bool = True
) -> dict[Setting, list[Record]]:
    """Return the rows by setting, with or without passes and threads, in a fixed order."""
    found: dict[Setting, list[Record]] = {}
    for record in records:
        row = record.row
        setting = Setting(
            str(row.get("dtype")),
            str(row.get("layout")),
            int(row.get("threads") or 0) if threads else 0,
            str(row.get("pass")) if passes else None,
        )
        found.setdefault(setting, []).append(record)

    def order(setting: Setting) -> tuple[Any, ...]:
        return (
            _at(DTYPES, setting.dtype),
            _at(LAYOUTS, setting.layout),
            setting.threads,
            _at(PASSES, setting.which or ""),
            setting,
        )

    return {setting: found[setting] for setting in sorted(found, key=order)}


def title_of(setting: Setting, among: Iterable[Setting]) -> str:
    """Name a setting; layout and threads only where others of the same report differ in them."""
    among = list(among)
    parts = [setting.dtype]
    if setting.which is not None:
        parts.append(setting.which)
    if len({other.layout for other in among}) > 1:
        parts.append(setting.layout)
    if len({other.threads for other in among}) > 1:
        parts.append(f"{setting.threads} thread{'s' if setting.threads > 1 else ''}")
    return ", ".join(parts)


def _span(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in (None, "")}))


def device_name(records: Iterable[Record]) -> str:
    """Return the name of the processor or GPU."""
    return _span(r.environment.get("device") for r in records) or "unknown device"


def machine(records: Iterable[Record]) -> str:
    """Return one sentence about where, with what and when rows were measured."""
    records = list(records)

    def each(name: str) -> str:
        return _span(r.environment.get(name) for r in records) or "unknown"

    days = sorted({str(r.environment.get("date", ""))[:10] for r in records} - {""})
    when = f"; {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    revisions = _span(r.environment.get("revision") for r in records)
    at = f" at {revisions}" if revisions else ""
    return (
        f"{device_name(records)}, {each('threads')} threads; PyTorch {each('torch')}; "
        f"dcconv {each('dcconv')}{at}{when}."
    )


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Return a Markdown table whose first columns are names and whose others are numbers."""
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def time(record: Record, provider: str | None) -> str:
    """Return a provider's median in ms, a dash where it has none."""
    median = record.median(provider or "")
    return "-" if median is None else milliseconds(median)


def _dagger(record: Record) -> str:
    return NOISY if record.noisy else ""


def noise(records: Iterable[Record]) -> str:
    """Return the sentence that counts the noisy rows; empty where there are none."""
    records = list(records)
    count = sum(record.noisy for record in records)
    if not count:
        return ""
    return (
        f"{NOISY} noisy, {count} of {len(records)} rows: the median of a provider is uncertain by "
        f"more than {100 * UNCERTAIN:.0f} % (two standard errors)."
    )


def _timeless(records: Iterable[Record]) -> str:
    """Return the sentence about rows that dcconv has no time for; empty where there are none."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.median(own_of(record) or "") is None:
            note = record.results.get(own_of(record) or "", {}).get("note") or "not measured"
            reasons.setdefault(str(note), []).append(record.key)
    return "; ".join(
        f"no time in {len(keys)} rows ({note}; first: {keys[0]})" for note, keys in reasons.items()
    )


def _cell(record: Record | None) -> str:
    """Return dcconv's time over F.conv2d, and over the compiled formula in parentheses."""
    if record is None:
        return "-"
    ratio, compiled = own_ratio(record, CONV2D), own_ratio(record, COMPILED)
    if ratio is None:
        note = record.results.get(own_of(record) or "", {}).get("note")
        return str(note).partition(":")[0] if note else "no time"
    text = number(ratio) + ("" if compiled is None else f" ({number(compiled)})")
    return (f"**{text}**" if beaten(record, COMPILED) else text) + _dagger(record)


def _verdict(setting: Setting, rows: Mapping[tuple[str, str, str], Record]) -> str:
    """Return the geometric means of one table of the operator layers, judged by the targets."""
    kinds = list(dict.fromkeys((operator, mode) for _, operator, mode in rows))
    parts = []
    for label, batch in (("`fixed` and `no-rho`", False), ("`batch`", True)):
        chosen = [r for (_, _, mode), r in rows.items() if (mode == "batch") == batch]
        mean = mean_over(chosen, CONV2D)
        if mean is None:
            continue
        text = f"{mean:.2f} for {label}"
        target = TARGETS.get((setting.dtype, setting.which or ""))
        judged = (setting.layout, setting.threads) == (TARGET_LAYOUT, TARGET_THREADS)
        if target is not None and judged and not batch:
            wanted = len(layer_classes(1)[OPERATOR]) * sum(mode != "batch" for _, mode in kinds)
            counted = sum(own_ratio(r, CONV2D) is not None for r in chosen)
            answer = "reached" if mean <= target else "not reached"
            if counted < wanted:
                answer = f"no verdict from {counted} of {wanted} rows"
            text += f" (target: at most {target:.2f}, **{answer}**)"
        parts.append(text)
    sentence = f"Geometric mean over {TITLES[CONV2D]}: {', '.join(parts) or 'none'}"
    compiled = mean_over(rows.values(), COMPILED)
    if compiled is not None:
        sentence += f"; over the {TITLES[COMPILED]}: {compiled:.2f}"
    return sentence + "."


def operator_tables(results: Results) -> str:
    """Return the layers that the targets are stated for, a table per dtype and pass."""
    records = [r for r in results.get("ops", ()) if OPERATOR in classes_of(r)]
    groups = settings(records)
    order = [layer.name for layer in layer_classes(1)[OPERATOR]]
    parts = []
    for setting, chosen in groups.items():
        kinds = list(dict.fromkeys((str(r.row["operator"]), str(r.row["mode"])) for r in chosen))
        rows = {
            (str(r.row["layer"]), str(r.row["operator"]), str(r.row["mode"])): r for r in chosen
        }
        layers = sorted(by_layer(chosen), key=lambda name: _at(order, name))
        parts.append(f"**{title_of(setting, groups)}**")
        parts.append(
            grid(
                ["layer", *(f"{operator}, {mode}" for operator, mode in kinds)],
                [[layer, *(_cell(rows.get((layer, *kind))) for kind in kinds)] for layer in layers],
            )
        )
        parts.append(_verdict(setting, rows))
        parts += filter(None, (noise(chosen),))
    return "\n\n".join(parts)


def _worst(records: Sequence[Record], base: str) -> str:
    """Return the largest ratio and its layer, and the operator and mode where rows differ in it."""
    ratios = [(ratio, r) for r in records if (ratio := own_ratio(r, base)) is not None]
    if not ratios:
        return ""
    ratio, record = max(ratios, key=lambda pair: pair[0])
    names = ["layer"] + [n for n in ("operator", "mode") if differs(records, n)]
    return f"{ratio:.2f}{_dagger(record)} " + " ".join(str(record.row[name]) for name in names)


def class_tables(results: Results) -> str:
    """Return geometric means and worst rows of every class, a table per dtype and pass."""
    groups = settings(results.get("ops", ()))
    header = ["class", "layers", *(f"over {TITLES[b]}" for b in (CONV2D, COMPILED, EAGER))]
    header += [f"worst over {TITLES[b]}" for b in (CONV2D, COMPILED)]
    parts = []
    for setting, chosen in groups.items():
        lines = [
            [name, str(len(by_layer(rows)))]
            + [number(class_mean(rows, base)) for base in (CONV2D, COMPILED, EAGER)]
            + [_worst(rows, base) for base in (CONV2D, COMPILED)]
            for name, rows in by_class(chosen).items()
        ]
        parts += [f"**{title_of(setting, groups)}**", grid(header, lines)]
        parts += filter(None, (noise(chosen),))
    return "\n\n".join(parts)


def summary_table(results: Results) -> str:
    """Return one small table: means by class over F.conv2d, and who wins how many rows."""
    records = [r for r in results.get("ops", ()) if r.row.get("layout") == TARGET_LAYOUT]
    groups = settings(records)
    if not groups:
        return ""
    header = ["class", *(title_of(setting, groups) for setting in groups), "rows"]
    header += [f"{TITLES[base]} faster" for base in (CONV2D, COMPILED)]
    lines = []
    for name, rows in (*by_class(records).items(), ("all", records)):
        inside = settings(rows)
        lines.append(
            [name]
            + [number(class_mean(inside.get(setting, ()), CONV2D)) for setting in groups]
            + [str(len(rows))]
            + [str(len(losses(rows, base))) for base in (CONV2D, COMPILED)]
        )
    return (
        f"Time of dcconv over that of {TITLES[CONV2D]}, geometric means over layers, and the rows "
        "in which another is faster beyond the spread:\n\n" + grid(header, lines)
    )


def losses(records: Iterable[Record], base: str) -> list[Record]:
    """Return the rows that a provider wins beyond the spread, worst first."""
    found = [r for r in records if beaten(r, base)]
    return sorted(found, key=lambda r: (-(own_ratio(r, base) or 0.0), r.key))


def _folded(
    header: Sequence[str], lines: Sequence[Sequence[str]], names: int, seen: int = OPEN_ROWS
) -> str:
    """Return a table; what is beyond ``seen`` lines is folded away below it."""
    text = grid(header, lines[:seen], names)
    if rest := lines[seen:]:
        text += f"\n\n<details><summary>{len(rest)} more rows</summary>\n\n"
        text += grid(header, rest, names) + "\n\n</details>"
    return text


def loss_tables(results: Results) -> str:
    """Return what dcconv loses: by class, then every row, to F.conv2d and to the formulas."""
    records = list(results.get("ops", ()))
    if not records:
        return ""
    bases = (CONV2D, COMPILED, COMPILED_EAGER, FORMULA, EAGER)
    present = [b for b in bases if any(b in r.results for r in records)]
    parts = [
        "Rows (layer, operator, mode, dtype, pass) in which another provider is faster than dcconv "
        "beyond the spread; a layer counts in every class that has it:"
    ]
    counts = [*by_class(records).items(), ("all", records)]
    parts.append(
        grid(
            ["class", "rows", *(f"{TITLES[base]} faster" for base in present)],
            [
                [name, str(len(rows)), *(str(len(losses(rows, base))) for base in present)]
                for name, rows in counts
            ],
        )
    )
    names = row_names(records)

    def identity(record: Record) -> list[str]:
        return [str(record.row.get(name)) for name in names]

    lost = losses(records, CONV2D)
    if lost:
        parts.append(f"Every row that {TITLES[CONV2D]} wins, worst first:")
        header = [*names, "times its time", "dcconv ms"]
        lines = [
            [
                *identity(r),
                number(own_ratio(r, CONV2D)) + _dagger(r),
                time(r, own_of(r)),
            ]
            for r in lost
        ]
        parts.append(_folded(header, lines, len(names), OPEN_LOSSES))
    same = [b for b in present if b != CONV2D]
    pairs = [(r, base) for base in same for r in losses(records, base)]
    pairs.sort(key=lambda pair: -(own_ratio(*pair) or 0.0))
    if pairs:
        parts.append("Every row that another way to compute the same operator wins, worst first:")
        header = [*names, "faster", "dcconv over it", f"over {TITLES[CONV2D]}", "dcconv ms"]
        lines = [
            [
                *identity(r),
                TITLES[base],
                number(own_ratio(r, base)) + _dagger(r),
                number(own_ratio(r, CONV2D)),
                time(r, own_of(r)),
            ]
            for r, base in pairs
        ]
        parts.append(_folded(header, lines, len(names) + 1))
    elif same:
        titles = ", ".join(TITLES[base] for base in same)
        parts.append(f"No row is won by another way to compute the same operator ({titles}).")
    shown = [*lost, *(r for r, _ in pairs)]
    if any(r.noisy for r in shown):
        parts.append(noise(records))
    if without := _timeless(records):
        parts.append(f"dcconv has {without}.")
    return "\n\n".join(parts)


PLAIN, REFERENCE = "plain", "reference"


def size_over(record: Record, what: str, provider: str | None, base: str) -> float | None:
    """Return a provider's ``peak`` or ``kept`` over another's, None where one is missing."""
    above, below = (size(record, what, name) for name in (provider, base))
    return None if above is None or not below else above / below


def size(record: Record, what: str, provider: str | None) -> float | None:
    """Return the bytes that a provider keeps or has at the peak."""
    value = record.results.get(provider or "", {}).get(what)
    if isinstance(value, dict):
        value = value.get("total")
    return None if value is None else float(value)


def network_label(record: Record) -> str:
    """Name a network with its images."""
    row = record.row
    return f"{row.get('network')}, {row.get('batch')} x {row.get('image_size')} px"


def network_tables(results: Results) -> str:
    """Return the steps of whole networks: dcconv over the plain network and over the reference."""
    records = results.get("networks", ())
    groups = settings(records, passes=False)
    names = [n for n in ("operator",) if differs(records, n)]
    header = ["network", *names, "pass", "plain ms", "dcconv ms", "over plain", "over reference"]
    header += ["images/s", "peak over plain", "over reference", "kept over plain", "over reference"]
    parts = []
    for setting, chosen in groups.items():
        lines = []
        for record in chosen:
            ours = own_of(record)
            rate = record.results.get(ours or "", {}).get("images_per_s")
            lines.append(
                [network_label(record), *(str(record.row[n]) for n in (*names, "pass"))]
                + [time(record, PLAIN), time(record, ours) + _dagger(record)]
                + [number(own_ratio(record, base)) for base in (PLAIN, REFERENCE)]
                + [number(rate, 1)]
                + [
                    number(size_over(record, what, ours, base))
                    for what in ("peak", "kept")
                    for base in (PLAIN, REFERENCE)
                ]
            )
        parts += [f"**{title_of(setting, groups)}**", grid(header, lines, 2 + len(names))]
        parts += filter(None, (noise(chosen),))
        if without := _timeless(chosen):
            parts.append(f"dcconv has {without}.")
    return "\n\n".join(parts)


def _ulp(values: Iterable[float | None]) -> str:
    """Return the largest of errors in ulp; JSON has null for infinity."""
    found = [math.inf if value is None else float(value) for value in values]
    largest = max(found, default=None)
    return "" if largest is None else f"{largest:.2f}" if largest < 1e4 else f"{largest:.1e}"


def function_tables(results: Results) -> str:
    """Return the largest error of every function in ulp, by dtype, and its cost."""
    records = results.get("functions", ())
    if not records:
        return ""
    dtypes = sorted({str(r.row["dtype"]) for r in records}, key=lambda name: _at(DTYPES, name))
    columns = [(dtype, part) for dtype in dtypes for part in ("value", "derivatives")]
    found: dict[str, dict[tuple[str, str], list[float | None]]] = {}
    wrong, noisy = set(), []
    costs: dict[str, str] = {}
    for record in records:
        name, dtype = str(record.row["function"]), str(record.row["dtype"])
        result = record.results.get(own_of(record) or "", {})
        cells = found.setdefault(name, {})
        for part, ulp in (result.get("max_ulp") or {}).items():
            column = "value" if part == "value" else "derivatives"
            cells.setdefault((dtype, column), []).append(ulp)
        if str(result.get("note") or "").startswith("wrong"):
            wrong.add((name, dtype))
        if dtype == dtypes[0] and record.row["pass"] == FORWARD and name not in costs:
            costs[name] = number(result.get("ns"), 3) + (_dagger(record) if "ns" in result else "")
            noisy.append(record)
    columns = [c for c in columns if any(c in cells for cells in found.values())]
    lines = []
    for name, cells in found.items():
        texts = [_ulp(cells.get(column, ())) for column in columns]
        texts = [
            f"**{text}**" if text and (name, column[0]) in wrong else text
            for text, column in zip(texts, columns, strict=True)
        ]
        lines.append([name, *texts, costs.get(name, "")])
    header = ["function", *(" ".join(column) for column in columns), f"ns, {dtypes[0]} {FORWARD}"]
    parts = [
        "Largest error in ulp of the dtype; ns per output of the operator with this function on a "
        "thin 1x1 layer. Bold: breaks the accuracy rule.",
        grid(header, lines),
    ]
    parts += filter(None, (noise(noisy),))
    return "\n\n".join(parts)


class Line(NamedTuple):
    """Times of a provider along one axis.

    Attributes:
        axis: what grows.
        rest: layer, and what else tells lines apart.
        provider: name; ``dcconv`` for the one a user gets.
        points: value of the axis and milliseconds, by value.
        noisy: whether one of the rows is.
    """

    axis: str
    rest: str
    provider: str
    points: list[tuple[float, float]]
    noisy: bool

    @property
    def exponent(self) -> str:
        """The power of the axis that time grows with, marked where points scatter about it."""
        return exponent(self.points)


SCALING_PROVIDERS = ("dcconv", CONV2D, COMPILED, EAGER)
THREADS = "threads"


def exponent(points: Iterable[tuple[float, float]]) -> str:
    """Return a fitted exponent as text, with ~ where its standard error is large or unknown."""
    found = fit(points)
    return "" if found is None else f"{found.exponent:.2f}" + (" ~" if found.poor else "")


def scaling_groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return the rows of each axis of a layer, by value."""
    records = list(records)
    known = ("axis", "value", "dtype", "layout", "pass", THREADS)
    others = dict.fromkeys(name for r in records for name in r.row if name not in known)
    names = [name for name in others if name == "layer" or differs(records, name)]
    on_threads = [r for r in records if r.row["axis"] != THREADS]
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        axis = str(record.row["axis"])
        parts = [str(record.row.get(name)) for name in names]
        if axis != THREADS and differs(on_threads, THREADS):
            parts.append(f"{record.row.get(THREADS)} threads")
        found.setdefault((axis, ", ".join(parts)), []).append(record)
    return {key: sorted(rows, key=lambda r: float(r.row["value"])) for key, rows in found.items()}


def scaling_lines(records: Iterable[Record]) -> list[Line]:
    """Return the lines of ``scaling`` rows: every axis of every layer by every provider."""
    found = []
    for (axis, rest), rows in scaling_groups(records).items():
        for provider in SCALING_PROVIDERS:
            points = [
                (float(r.row["value"]), median)
                for r in rows
                if (median := r.median(own_of(r) or "" if provider == "dcconv" else provider))
                is not None
            ]
            if points:
                noisy = any(r.noisy for r in rows)
                found.append(Line(axis, rest, provider, points, noisy))
    return found


def scaling_tables(results: Results) -> str:
    """Return the exponents by which time grows along every axis, beside the work's."""
    groups = settings(results.get("scaling", ()), threads=False)
    parts = []
    for setting, chosen in groups.items():
        lines = scaling_lines(chosen)
        present = [p for p in SCALING_PROVIDERS if any(line.provider == p for line in lines)]
        rows = []
        for (axis, rest), records in scaling_groups(chosen).items():
            by = {line.provider: line for line in lines if (line.axis, line.rest) == (axis, rest)}
            first, last = (f"{float(records[at].row['value']):g}" for at in (0, -1))
            dagger = NOISY if any(r.noisy for r in records) else ""
            work = [(float(r.row["value"]), float(r.facts.get("flops") or 0)) for r in records]
            has_work = axis != THREADS and all(flops > 0 for _, flops in work)
            cells = [axis, rest, f"{first} to {last}{dagger}"]
            cells.append(exponent(work) if has_work else "")
            rows.append(cells + [by[p].exponent if p in by else "" for p in present])
        titles = [TITLES.get(p, p) for p in present]
        parts += [
            f"**{title_of(setting, groups)}**",
            grid(["what grows", "layer", "from", "FLOPs", *titles], rows, 3),
        ]
        parts += filter(None, (noise(chosen),))
    if parts:
        parts.insert(
            0,
            "Exponents: with which power of what grows the work and the times grow; ~ of two "
            "points, or a standard error above 0.1.",
        )
    return "\n\n".join(parts)


def row_tables(results: Results) -> str:
    """Return every row of ``ops``: times, rates, memory and spread, a table per dtype and pass."""
    groups = settings(results.get("ops", ()))
    parts = []
    for setting, chosen in groups.items():
        present = [name for name in PROVIDERS if any(name in r.results for r in chosen)]
        names = ["layer", "operator", "mode", *(n for n in ("graphs",) if differs(chosen, n))]
        lines = []
        for record in chosen:
            own, spread = record.results.get(own_of(record) or "", {}), record.spread
            sizes = [size(record, what, own_of(record)) for what in ("peak", "kept")]
            lines.append(
                [str(record.row.get(name)) for name in names]
                + [time_cell(record, name) for name in present]
                + [number(own_ratio(record, base)) for base in (CONV2D, EAGER, COMPILED)]
                + [number(own.get("gbps"), 1), number(own.get("tflops"), 3)]
                + [number(own.get("roofline"))]
                + [number(None if value is None else value / 2**20, 1) for value in sizes]
                + ["" if spread is None else f"{100 * spread:.0f} %{_dagger(record)}"]
            )
        header = [*names, *present, *(f"over {base}" for base in (CONV2D, EAGER, COMPILED))]
        header += ["GB/s", "TFLOP/s", "roofline", "peak", "kept", "spread"]
        parts += [f"**{title_of(setting, groups)}**", grid(header, lines, len(names))]
        parts += filter(None, (noise(chosen),))
    if parts:
        parts.insert(
            0,
            "Times in ms; ratios, rates, share of the roofline and memory (MiB) are those of "
            "dcconv; spread: the largest distance of the 20th and 80th percentile of a provider, "
            "over its median.",
        )
    return "\n\n".join(parts)


#: What can stand between markers, by name.
TABLES: dict[str, Callable[[Results], str]] = {
    "ops-summary": summary_table,
    "ops-operator": operator_tables,
    "ops-classes": class_tables,
    "ops-losses": loss_tables,
    "networks": network_tables,
    "functions": function_tables,
    "scaling": scaling_tables,
    "ops-rows": row_tables,
    "machine": machine_tables,
}


_MARKER = re.compile(r"<!-- bench (\S+): (begin|end) -->\s*")


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8").splitlines(keepends=True)


def _parts(path: Path, lines: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the indices of the lines with the two markers of every name."""
    found: dict[str, tuple[int, int]] = {}
    open_name, begin = "", 0
    for at, line in enumerate(lines):
        match = _MARKER.fullmatch(line)
        if match is None:
            continue
        name, what = match.groups()
        where = f"{path}:{at + 1}"
        if name not in TABLES:
            raise value_error(where, f"name one of {', '.join(TABLES)}", repr(name))
        if what == "begin":
            if open_name:
                break
            if name in found:
                raise value_error(where, "be the only marker of its name", repr(name))
            open_name, begin = name, at
        elif name != open_name:
            raise value_error(where, f"come after <!-- bench {name}: begin -->", repr(line.strip()))
        else:
            found[name] = (begin, at)
            open_name = ""
    if open_name:
        rule = f"be followed by <!-- bench {open_name}: end -->"
        raise value_error(f"{path}:{begin + 1}", rule, "no such line")
    return found


def markers(path: Path) -> list[str]:
    """Return the names of the tables that a file has markers for.

    Raises:
        ValueError: a marker is unknown, repeated or without its other half; with its line.
    """
    return list(_parts(path, _lines(path)))


def refresh(path: Path, texts: Mapping[str, str]) -> bool:
    """Replace the text between the markers of each name; return whether the file has changed."""
    lines = _lines(path)
    parts = sorted(_parts(path, lines).items(), key=lambda item: item[1], reverse=True)
    for name, (begin, end) in parts:
        if name in texts:
            lines[begin + 1 : end] = [f"\n{texts[name]}\n\n"]
    return write(path, "".join(lines).encode())


def write(path: Path, data: bytes) -> bool:
    """Write a file in one step, unless it has these bytes already; return whether it had not.

    Readers see the old bytes or the new ones.
    """
    mode = 0o644
    if path.exists():
        if path.read_bytes() == data:
            return False
        mode = path.stat().st_mode & 0o777
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True
