"""Compare training runs: ``python -m train.report RUN [RUN ...]`` prints a table, draws curves.

A run is a folder that the engine wrote. Every figure comes from its ``metrics.jsonl``; what the
training was, from ``config.yaml`` and ``results.json``.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from dcconv.operator.checks import value_error
from train.engine.config import read_yaml
from train.engine.files import ContentError, read_json, reason_of
from train.engine.folder import CONFIG, METRICS, RESULTS, write_file
from train.engine.logs import EVALUATE, TRAIN, read_metrics
from train.engine.terminal import SpellingConsole, prepare

# Okabe and Ito's colours without the yellow, which is too light for a line on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777")
_DASHES = ("-", "--", "-.", ":")
# What two runs must have in common for their times to be compared, besides the operator.
_COSTLY = (
    *("network", "widths", "classes", "batch_size", "accumulate", "world_size"),
    *("device", "threads", "amp", "channels_last", "compile"),
)
NOTHING = "–"  # noqa: RUF001  (what a table shows where there is no figure)


@dataclass(frozen=True)
class Run:
    """What a report knows of one run: its records in order, and what was stored beside them."""

    name: str
    records: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    results: dict[str, Any]

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a figure, and the figures."""
        found = [r for r in self.records if r["kind"] == kind and r.get(name) is not None]
        return [r["step"] for r in found], [float(r[name]) for r in found]

    def fact(self, name: str) -> Any:
        """Return what the results say of the run, else what its configuration does."""
        return self.results.get(name) or self.config.get(name)

    def median(self, name: str) -> float | None:
        """Return the median over the log's lines: the first line, with its warm-up, counts once."""
        _, values = self.series(TRAIN, name)
        return statistics.median(values) if values else None


def read_run(path: Path, warn: Callable[[str], None]) -> Run:
    """Read a run's folder; damaged lines of its log are reported and skipped.

    Raises:
        ValueError: it is no folder with a readable log.
    """
    if not path.is_dir():
        raise value_error("run", "be the folder of a run", repr(str(path)))
    records = read_metrics(path / METRICS, warn)
    config = read_yaml(path / CONFIG, "run") if (path / CONFIG).exists() else {}
    results: Any = {}
    if (path / RESULTS).exists():
        try:
            results = read_json(path / RESULTS)
        except (ContentError, OSError) as error:
            got = f"'{path}' ({reason_of(error)})"
            warn(str(value_error("run", f"have a readable {RESULTS}", got)))
        if not isinstance(results, dict):
            warn(str(value_error("run", f"have a mapping in {RESULTS}", f"'{path}'")))
            results = {}
    return Run(path.resolve().name, tuple(records), config, results)


def _number(value: Any, text: str) -> str:
    return NOTHING if not isinstance(value, (int, float)) else text.format(value)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _peak(run: Run) -> float | None:
    return max(run.series(TRAIN, "peak_bytes")[1], default=None)


def _plain(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the first run of ``nn.Conv2d`` that differs from a run in nothing that costs time."""

    def kind(other: Run) -> list[Any]:
        return [other.fact(name) for name in _COSTLY]

    return next((r for r in runs if r.fact("operator") == "conv" and kind(r) == kind(run)), None)


def _ratio(value: float | None, plain: float | None) -> float | None:
    return None if value is None or not plain else value / plain


def _cells(run: Run, runs: Sequence[Run]) -> list[str]:
    """Return a run's row, in the order of ``_TITLES``."""
    _, accuracies = run.series(EVALUATE, "accuracy")
    steps = [record["step"] for record in run.records]
    operator = run.fact("operator")
    plain = _plain(run, runs)
    seconds, peak = run.median("step_seconds"), _peak(run)
    plain_seconds = None if plain is None else plain.median("step_seconds")
    plain_peak = None if plain is None else _peak(plain)
    return [
        run.name,
        str(operator or NOTHING),
        _number(run.results.get("parameters"), "{:,}"),
        _number(accuracies[-1] if accuracies else None, "{:.2f}"),
        _number(max(accuracies, default=None), "{:.2f}"),
        _number(max(steps, default=None), "{:,}"),
        _number(run.median("images_per_second"), "{:,.4g}"),
        _number(_scaled(seconds, 1e3), "{:,.4g}"),
        _number(_ratio(seconds, plain_seconds), "{:.2f}"),
        _number(_scaled(peak, 2**-20), "{:,.0f}"),
        _number(_ratio(peak, plain_peak), "{:.2f}"),
        _number(_scaled(run.median("waiting_share"), 100), "{:.2f}"),
    ]


_TITLES = (
    "run",
    "operator",
    "parameters",
    "final %",
    "best %",
    "steps",
    "images/s",
    "ms/step",
    "x conv",
    "peak MiB",
    "peak x conv",
    "waiting %",
)


def table(runs: Sequence[Run]) -> Table:
    """Return one row per run: final and best accuracy, and medians of the log's figures.

    Step time and memory are also given as multiples of a run with plain convolution, where there
    is one of the same network, batch and precision on the same device.
    """
    result = Table(title="accuracy on the evaluation set; medians over the log", box=box.SIMPLE)
    for index, title in enumerate(_TITLES):
        result.add_column(title, justify="left" if index < 2 else "right", overflow="fold")
    for run in runs:
        result.add_row(*_cells(run, runs))
    return result


def markdown(runs: Sequence[Run]) -> str:
    """Return the same table as Markdown."""
    lines = [
        " | ".join(_TITLES),
        " | ".join("---" if index < 2 else "---:" for index in range(len(_TITLES))),
        *(" | ".join(cell.replace("|", "\\|") for cell in _cells(run, runs)) for run in runs),
    ]
    return "".join(f"| {line} |\n" for line in lines)


def _draw(axes: Axes, runs: Sequence[Run], kind: str, name: str) -> None:
    for index, run in enumerate(runs):
        steps, values = run.series(kind, name)
        axes.plot(
            steps,
            values,
            label=run.name,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
            marker="o" if len(steps) < 30 else None,
            markersize=3.5,
            linewidth=1.5,
        )


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Draw training loss and evaluation accuracy by step, one line per run, as a PNG."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.8 + 0.2 * len(runs)), layout="constrained")
        FigureCanvasAgg(figure)
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        _draw(loss_axes, runs, TRAIN, "loss")
        _draw(accuracy_axes, runs, EVALUATE, "accuracy")
        loss_axes.set(title="Training loss", xlabel="step", ylabel="loss")
        accuracy_axes.set(title="Accuracy", xlabel="step", ylabel="right images (%)")
        losses = [value for run in runs for value in run.series(TRAIN, "loss")[1]]
        # Decades help where there are some.
        if losses and 0 < 5 * min(losses) < max(losses):
            loss_axes.set_yscale("log")
            loss_axes.yaxis.set_major_formatter("{x:g}")
        for axes in (loss_axes, accuracy_axes):
            axes.grid(color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        handles, labels = loss_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="Compare training runs: table and curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="receives the curves, a PNG (default: curves.png, in the run's folder if it is one)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.report`` and return its exit status."""
    prepare()
    given = _parse(arguments)

    def warn(text: str) -> None:
        sys.stderr.write(text + "\n")

    paths = [Path(run) for run in given.runs]
    default = paths[0] / "curves.png" if len(paths) == 1 else Path("curves.png")
    out = Path(given.out) if given.out is not None else default
    try:
        runs = [read_run(path, warn) for path in paths]
        try:
            write_file(out, draw_curves(runs))
        except OSError as error:
            got = f"'{out}' ({error.strerror})"
            raise value_error("out", "be a file that can be written", got) from error
    except ValueError as error:
        if not str(error).startswith("dcconv: "):
            raise
        warn(str(error))
        return 2
    if given.markdown:
        sys.stdout.write(markdown(runs))
        return 0
    console = SpellingConsole(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(table(runs))
    console.print(f"Curves in {os.fspath(out)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
