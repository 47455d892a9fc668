"""What the digits training shows at its end: one row per operator, as a table and as a figure."""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from rich.table import Table

from train.networks import find_operator

# Okabe and Ito's colours without the yellow, which is too light for a line on white; markers and
# dashes tell operators apart where colour does not.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777")
_MARKERS = "osD^vP*X<>"
_DASHES = ("-", "--", "-.")


@dataclass(frozen=True)
class Epoch:
    """One epoch of one training: mean training loss, test accuracy (%), seconds so far."""

    operator: str
    seed: int
    epoch: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """One operator over its finished trainings; accuracies in %, kept memory in bytes."""

    operator: str
    parameters: int
    kept_bytes: int
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    accuracy_mean: float
    accuracy_deviation: float | None
    seconds_mean: float


def make_row(operator: str, parameters: int, kept_bytes: int, last_epochs: Sequence[Epoch]) -> Row:
    """Summarise an operator by the last epoch of each of its trainings.

    The deviation is the sample standard deviation, None for a single seed.
    """
    accuracies = tuple(last.accuracy for last in last_epochs)
    return Row(
        operator,
        parameters,
        kept_bytes,
        tuple(last.seed for last in last_epochs),
        accuracies,
        statistics.fmean(accuracies),
        statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        statistics.fmean(last.seconds for last in last_epochs),
    )


def accuracy_text(row: Row) -> str:
    """Return the mean accuracy with its deviation, where there is one."""
    deviation = row.accuracy_deviation
    return f"{row.accuracy_mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def table(rows: Sequence[Row]) -> Table:
    """Return the final table."""
    result = Table(title="test accuracy: mean and standard deviation over seeds; time per training")
    result.add_column("operator", no_wrap=True)
    for title in ("seeds", "accuracy %", "seconds", "kept MiB"):
        result.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.operator,
            str(len(row.seeds)),
            accuracy_text(row),
            f"{row.seconds_mean:.1f}",
            f"{row.kept_bytes / 2**20:.2f}",
        )
    return result


def _by_epoch(epochs: Sequence[Epoch], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epoch numbers and one row of values per seed, [seeds, epochs]."""
    seeds: dict[int, list[float]] = defaultdict(list)
    for epoch in epochs:
        seeds[epoch.seed].append(getattr(epoch, field))
    values = np.array(list(seeds.values()))
    return np.arange(1, values.shape[1] + 1), values


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def _draw_curve(axes: Axes, x: np.ndarray, values: np.ndarray, index: int) -> None:
    style = _style(index)
    axes.plot(
        x, values.mean(axis=0), linewidth=1.6, markersize=4.5, markevery=(index % 3, 3), **style
    )
    axes.fill_between(
        x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.10, linewidth=0
    )


def draw_curves(rows: Sequence[Row], epochs: Sequence[Epoch], test_images: int) -> bytes:
    """Draw training loss and test error by epoch, and the final accuracies, as a PNG.

    Args:
        rows: the operators to show, in order.
        epochs: every epoch of their finished trainings; others are left out.
        test_images: size of the test set: an error of none is drawn at half an image.
    """
    height = max(4.6, 1.6 + 0.36 * len(rows))
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14.5, height), layout="constrained")
        FigureCanvasAgg(figure)
        loss_axes, error_axes, final_axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.85))
        for index, row in enumerate(rows):
            mine = [e for e in epochs if e.operator == row.operator and e.seed in row.seeds]
            _draw_curve(loss_axes, *_by_epoch(mine, "loss"), index)
            x, accuracies = _by_epoch(mine, "accuracy")
            _draw_curve(error_axes, x, np.maximum(100 - accuracies, 50 / test_images), index)
            style = _style(index) | {"linestyle": "none"}
            final_axes.plot(
                row.accuracies, [index] * len(row.accuracies), markersize=5, alpha=0.45, **style
            )
            final_axes.errorbar(
                row.accuracy_mean,
                index,
                xerr=row.accuracy_deviation or 0,
                markersize=9,
                capsize=4,
                elinewidth=1.6,
                **style,
            )
        for axes in (loss_axes, error_axes, final_axes):
            axes.set_axisbelow(True)
        for axes, title, label in (
            (loss_axes, "Training loss", "cross entropy"),
            (error_axes, "Test error", "wrong test images (%)"),
        ):
            axes.set(title=title, xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(which="major", color="#dddddd", linewidth=0.8)
            axes.grid(which="minor", color="#eeeeee", linewidth=0.5)
            # Where every training has diverged there is nothing that a logarithm could show.
            if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
                axes.yaxis.set_minor_formatter("{x:g}")
        final_axes.set(
            title="Final test accuracy",
            xlabel="right test images (%)",
            yticks=range(len(rows)),
            yticklabels=[find_operator(row.operator).label.replace(", ", ",\n") for row in rows],
        )
        final_axes.set_ylim(len(rows) - 0.4, -0.6)
        final_axes.xaxis.set_major_locator(MaxNLocator(5))
        final_axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        seeds = max((len(row.seeds) for row in rows), default=0)
        figure.suptitle(
            f"Left and middle: mean over {seeds} seed{'' if seeds == 1 else 's'}, shaded from "
            "lowest to highest, marked as on the right. "
            "Right: mean and standard deviation (large), each seed (small).",
            fontsize=10,
        )
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
