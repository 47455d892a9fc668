"""Draw the charts of measured rows and refresh the tables of README and docs.

Reads every result file of the folders that are named (all of bench/results), takes the latest
record of each row, and writes PNG charts and report.md beside the files. What stands between the
markers ``<!-- bench NAME: begin -->`` and ``<!-- bench NAME: end -->`` of the README is replaced by
the table of that name. Lines that are no records are reported with file and line, and skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from bench.environment import RESULTS
from bench.readme import TABLES, Results, device_name, machine, markers, refresh, write
from bench.records import Record, latest, read
from dcconv.operator.checks import value_error

ROOT = RESULTS.parent.parent
#: The files with markers.
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="of result files, by path or by name under bench/results (all that have some)",
    )
    add("--readme", type=Path, metavar="FOLDER", help="whose numbers the pages show (the CPU's)")
    add(
        "--into",
        type=Path,
        metavar="FILE",
        action="append",
        help="a file with markers, may be given again (README.md and docs/performance.md)",
    )


def find(folder: Path) -> Path:
    """Return a folder of result files that was named by its path, or by name under the results.

    Raises:
        ValueError: there is none with result files.
    """
    for path in (folder, RESULTS / folder):
        if path.is_dir() and any(path.glob("*.jsonl")):
            return path.resolve()
    rule = f"be a folder of result files ({', '.join(p.name for p in every()) or 'there is none'})"
    raise value_error("FOLDER", rule, repr(str(folder)))


def every() -> list[Path]:
    """Return the folders under the results that have result files."""
    return sorted({path.parent.resolve() for path in RESULTS.glob("*/*.jsonl")})


#: Tables that no device was measured for, with the kind of their rows: pages show the rows of any
#: folder that has some.
PREDICTED = {"machine": "machine"}

#: What a row of each kind must name for the tables.
FIELDS = {
    "ops": ("layer", "operator", "mode", "dtype", "layout", "pass", "threads"),
    "networks": ("network", "dtype", "pass"),
    "functions": ("function", "dtype", "pass"),
    "scaling": ("axis", "value"),
    "machine": ("gpu", "dtype", "layout", "function", "operator"),
    "machine_rule": ("gpu", "batch", "dtype", "operator", "layer", "direction"),
    "machine_network": ("gpu", "network", "batch", "dtype", "operator", "layer", "count"),
}


def _why_not(record: Record) -> str | None:
    """Return what a record lacks to be shown, or None."""
    missing = [name for name in FIELDS.get(record.kind, ()) if name not in record.row]
    if missing:
        return f"its row has no {', '.join(missing)}"
    return None


def load(folder: Path) -> dict[str, list[Record]]:
    """Return the latest records of a folder by kind; corrupt ones are reported and skipped."""
    found: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in latest(read(path)):
            if reason := _why_not(record):
                print(f"{path}: {record.key}: {reason}, skipped", file=sys.stderr)
            else:
                found.setdefault(record.kind, []).append(record)
    return found


def _everything(results: Results) -> list[Record]:
    return [record for records in results.values() for record in records]


def _is_cpu(results: Results) -> bool:
    types = {record.environment.get("device_type") for record in _everything(results)}
    return types == {"cpu"}


def choose(loaded: dict[Path, dict[str, list[Record]]], readme: Path | None) -> Path:
    """Return the folder whose numbers the pages show.

    Raises:
        ValueError: the named one is not among the folders, or none is named and it is not clear.
    """
    known = ", ".join(path.name for path in loaded)
    if readme is not None:
        chosen = find(readme)
        if chosen not in loaded:
            raise value_error("--readme", f"be one of {known}", repr(str(readme)))
        return chosen
    for among in (list(loaded), [path for path, results in loaded.items() if _is_cpu(results)]):
        if len(among) == 1:
            return among[0]
    raise value_error("--readme", f"name one of {known}", "nothing")


def markdown(results: Results, charts: Iterable[tuple[str, str]]) -> str:
    """Return the full report: every table that has rows, and the charts by file name."""
    records = _everything(results)
    parts = [f"# {device_name(records)}", machine(records)]
    parts += [f"![{caption}]({name})" for name, caption in charts]
    for name, table in TABLES.items():
        if text := table(results):
            parts += [f"## {name}", text]
    return "\n\n".join(parts) + "\n"


def tables(results: Results, names: Sequence[str]) -> dict[str, str]:
    """Return the text between markers by name, without those that have no rows."""
    found = {name: TABLES[name](results) for name in names}
    sentence = machine(_everything(results))
    return {
        name: text if name in PREDICTED else f"{text}\n\nMeasured on {sentence}"
        for name, text in found.items()
        if text
    }


def predicted(loaded: dict[Path, dict[str, list[Record]]], names: Sequence[str]) -> dict[str, str]:
    """Return the text of predictions by name, of the last folder that has their rows."""
    found: dict[str, str] = {}
    for results in loaded.values():
        wanted = [name for name in names if PREDICTED.get(name) in results]
        found |= tables(results, wanted)
    return found


def run(options: argparse.Namespace, console: Console) -> int:
    """Write charts, reports and the tables of the pages; return 0."""
    # Drawing alone needs matplotlib: the other sub-commands run without it.
    from bench.charts import draw

    folders = [find(folder) for folder in options.folders] or every()
    if not folders:
        raise value_error("FOLDER", f"have result files, under {RESULTS}", "none")
    pages = list(options.into or PAGES)
    for page in pages:
        if not page.is_file():
            raise value_error("--into", "be a file", repr(str(page)))
    names = {page: markers(page) for page in pages}
    loaded = {}
    for folder in dict.fromkeys(folders):
        if results := load(folder):
            loaded[folder] = results
        elif options.folders:
            raise value_error("FOLDER", "have result rows", repr(str(folder)))
        else:
            console.print(f"{folder}: no result rows", style="yellow", highlight=False)
    if not loaded:
        raise value_error("FOLDER", f"have result rows, under {RESULTS}", "none")
    shown = choose(loaded, options.readme) if any(names.values()) or options.readme else None

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for folder, results in loaded.items():
        charts = draw(results)
        for chart in charts:
            write(folder / chart.name, chart.png)
        text = markdown(results, [(chart.name, chart.caption) for chart in charts])
        write(folder / "report.md", text.encode())
        rows = {kind: len(records) for kind, records in results.items()}
        counts = ", ".join(f"{count} {kind}" for kind, count in rows.items())
        noisy = sum(record.noisy for record in _everything(results))
        say(f"{folder}: {counts} rows, {noisy} noisy; {len(charts)} charts and report.md")
    if shown is not None:
        for page, listed in names.items():
            texts = tables(loaded[shown], listed) | predicted(loaded, listed)
            for name in listed:
                if name not in texts:
                    say(f"{page}: {name} stays as it is, {shown.name} has no rows for it")
            changed = refresh(page, texts)
            say(f"{page}: {'refreshed' if changed else 'unchanged'} ({', '.join(listed)})")
    return 0
