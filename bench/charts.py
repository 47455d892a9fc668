"""Charts of a device's results as PNG files: equal records give equal bytes."""

from __future__ import annotations

import functools
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from bench import readme
from bench.options import BOTH, PASSES
from bench.providers import COMPILED, CONV2D, EAGER, FORMULA
from bench.readme import Results, Setting
from bench.records import Record
from bench.tables import mean_by_layer, own_of

# Okabe and Ito's colours; their yellow is too light on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#8C8C8C",
)

# Charts are drawn as wide as a README shows them, 9 inches at 100 pixels, and half as sharp again.
WIDTH, RESOLUTION = 9.0, 150

OURS = "dcconv"
COLOURS = {OURS: BLUE, COMPILED: ORANGE, FORMULA: SKY, EAGER: GREY, CONV2D: BLACK}
LABELS = {
    OURS: "dcconv",
    COMPILED: "compiled formula",
    FORMULA: "formula, eager",
    EAGER: "eager reference",
    CONV2D: "F.conv2d",
}

PASS_STYLES = {PASSES[0]: (BLUE, "o"), PASSES[1]: (ORANGE, "^"), PASSES[2]: (GREEN, "s")}

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


# Behind text that lies on a grid.
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}


class Chart(NamedTuple):
    """A figure: the name of its file, what it shows in a sentence, its bytes."""

    name: str
    caption: str
    png: bytes


@contextmanager
def _canvas(height: float, title: str, subtitle: str) -> Iterator[Figure]:
    """Yield a figure with its two lines of title."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"{title}\n{subtitle}",
            x=0.012,
            horizontalalignment="left",
            fontsize=11,
            linespacing=1.5,
        )
        yield figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    # Without matplotlib's version: the same picture is the same file.
    figure.savefig(file, format="png", dpi=RESOLUTION, metadata={"Software": None})
    return file.getvalue()


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two numbers, fewer over a wide range."""
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    wide = high / low
    steps = (1, 1.5, 2, 3, 5, 7) if wide < 12 else (1, 2, 5) if wide < 300 else (1,)
    ticks = [step * 10.0**e for e in exponents for step in steps]
    return [tick for tick in ticks if low / 1.0001 <= tick <= high * 1.0001]


def _log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    axis.set_major_locator(FixedLocator(_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _name(stem: str, setting: Setting, among: Iterable[Setting]) -> str:
    """Return the file name of a setting's chart."""
    return f"{stem}-{readme.title_of(setting, among).replace(', ', '-').replace(' ', '-')}.png"


def _provider(record: Record, name: str) -> str:
    return own_of(record) or "" if name == OURS else name


def _over_conv2d(record: Record, provider: str) -> float | None:
    return record.ratio(_provider(record, provider), CONV2D)


class Ratio(NamedTuple):
    """A class of a panel: geometric means over F.conv2d by provider, and its layers.

    Attributes:
        name: of the class.
        means: by provider, over the layers that have it.
        layers: dcconv over F.conv2d of every layer, and whether the compiled formula is faster.
    """

    name: str
    means: dict[str, float]
    layers: list[tuple[float, bool]]


def ratios(records: Sequence[Record]) -> list[Ratio]:
    """Return what the ratio bars show: geometric means over layers, operators and modes."""
    found = []
    for name, rows in readme.by_class(records).items():
        means = {}
        for provider in (OURS, COMPILED, EAGER):
            mean = mean_by_layer(rows, functools.partial(_over_conv2d, provider=provider))
            if mean is not None:
                means[provider] = mean
        layers = []
        for chosen in readme.by_layer(rows).values():
            ratio = readme.mean_over(chosen, CONV2D)
            compiled = readme.mean_over(chosen, COMPILED)
            if ratio is not None:
                layers.append((ratio, compiled is not None and compiled > 1))
        if means:
            found.append(Ratio(name, means, layers))
    return found


_LAYER: dict[str, Any] = {"ls": "", "marker": "o", "color": SKY, "ms": 4.5, "mec": BLUE, "mew": 0.7}
_LOSS: dict[str, Any] = {
    "ls": "",
    "marker": "X",
    "color": VERMILLION,
    "ms": 7,
    "mec": "white",
    "mew": 0.5,
}


def _draw_ratios(axes: Axes, found: Sequence[Ratio], names: Sequence[str]) -> None:
    bars = (OURS, COMPILED, EAGER)
    step = 0.22
    for ratio in found:
        y = names.index(ratio.name)
        for at, provider in enumerate(bars):
            if provider not in ratio.means:
                continue
            mean = ratio.means[provider]
            axes.barh(
                y + (at - 0.45) * step, mean - 1, step * 0.88, left=1, color=COLOURS[provider]
            )
        # Neighbours are set apart so that equal ratios remain countable; losses lie on top.
        for at, (value, loses) in enumerate(sorted(ratio.layers)):
            height = y - 1.6 * step + step * 0.3 * (at % 3 - 1)
            if loses:
                axes.plot(value, height, zorder=4, **_LOSS)
            else:
                axes.plot(value, height, zorder=3, **_LAYER)
        if OURS in ratio.means:
            axes.text(
                1.01,
                y - 0.45 * step,
                f"{ratio.means[OURS]:.2f}",
                transform=axes.get_yaxis_transform(),
                verticalalignment="center",
                color=BLUE,
                fontweight="bold",
                fontsize=9,
            )
    axes.axvline(1, color=BLACK, linewidth=1.2)
    axes.grid(axis="x")


def ratio_charts(results: Results) -> list[Chart]:
    """Draw time over F.conv2d by class: a file per dtype, a panel per pass."""
    records = results.get("ops", ())
    groups = readme.settings(records, passes=False)
    charts = []
    for setting, rows in groups.items():
        panels = [(s.which, ratios(r)) for s, r in readme.settings(rows).items()]
        panels = [(which, found) for which, found in panels if found]
        if not panels:
            continue
        names = list(readme.by_class(rows))
        counts = {name: len(readme.by_layer(r)) for name, r in readme.by_class(rows).items()}
        values = [1.0]
        for _, found in panels:
            for ratio in found:
                values += [*ratio.means.values(), *(value for value, _ in ratio.layers)]
        low, high = min(values) / 1.12, max(values) * 1.12
        title = readme.title_of(setting, groups)
        with _canvas(
            1.7 + 0.58 * len(names),
            f"Time of a decoupled layer over F.conv2d's, {title}",
            f"{readme.device_name(rows)}; geometric means by class of layers, left is faster",
        ) as figure:
            grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
            for axes, (which, found) in zip(grid[0], panels, strict=True):
                _draw_ratios(axes, found, names)
                _log_axis(axes, "x", low, high)
                axes.set_title(str(which), loc="left")
                axes.set_xlabel("time / time of F.conv2d")
                axes.set_yticks(range(len(names)), [f"{n} ({counts[n]})" for n in names])
                axes.tick_params(axis="y", length=0)
            grid[0][0].set_ylim(len(names) - 0.45, -0.55)
            grid[0][0].set_ylabel("class of layers (number of layers)")
            handles: list[Patch | Line2D] = [
                Patch(color=COLOURS[name], label=LABELS[name]) for name in (OURS, COMPILED, EAGER)
            ]
            handles.append(Line2D([], [], label="a layer, dcconv", **_LAYER))
            handles.append(Line2D([], [], label="a layer, slower than compiled", **_LOSS))
            figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
            charts.append(
                Chart(
                    _name("ops-ratio", setting, groups),
                    f"Time over F.conv2d by class of layers, {title}.",
                    _png(figure),
                )
            )
    return charts


def _rate(record: Record, provider: str) -> float | None:
    """Return TFLOP/s by the row's least work."""
    median, flops = record.median(provider), record.facts.get("flops")
    return None if median is None or not flops else float(flops) / median / 1e9


def _intensity(record: Record) -> float | None:
    flops, moved = record.facts.get("flops"), record.facts.get("bytes")
    return float(flops) / float(moved) if flops and moved else None


def roofline_charts(results: Results) -> list[Chart]:
    """Draw arithmetic intensity against TFLOP/s, under the two ceilings: a file per dtype."""
    groups = readme.settings(results.get("ops", ()), passes=False)
    charts = []
    for setting, rows in groups.items():
        copies = [float(r.facts["copy_gbps"]) for r in rows if r.facts.get("copy_gbps")]
        matrices = [float(r.facts["matrix_tflops"]) for r in rows if r.facts.get("matrix_tflops")]
        # conv2d, shown beside every operator and mode of a layer, is drawn once per row.
        points = [
            (x, y, provider, str(r.row.get("pass")))
            for provider in (CONV2D, OURS)
            for r in rows
            if (x := _intensity(r)) is not None
            and (y := _rate(r, _provider(r, provider))) is not None
        ]
        if not points or not copies or not matrices:
            continue
        copy, matrix = statistics.median(copies), statistics.median(matrices)
        title = readme.title_of(setting, groups)
        with _canvas(
            5.6,
            f"Roofline of decoupled layers, {title}",
            f"{readme.device_name(rows)}; work and traffic are the least that a row can do with",
        ) as figure:
            axes = figure.subplots()
            low = min(x for x, *_ in points) / 1.6
            high = max(max(x for x, *_ in points) * 1.6, 2.5 * matrix * 1e3 / copy)
            bottom = min(y for _, y, *_ in points) / 1.6
            top = max(matrix, *(y for _, y, *_ in points)) * 2
            knee = matrix * 1e3 / copy
            axes.plot([low, knee, high], [low * copy / 1e3, matrix, matrix], color=BLACK, lw=1.8)
            axes.annotate(
                f"matrix rate {matrix:.3g} TFLOP/s",
                (high, matrix),
                (-4, 4),
                textcoords="offset points",
                horizontalalignment="right",
                fontsize=9,
                bbox=_PLAIN,
            )
            _log_axis(axes, "x", low, high)
            _log_axis(axes, "y", min(bottom, low * copy / 1e3), top)
            start = (low * knee) ** 0.5
            axes.annotate(
                f"copy rate {copy:.3g} GB/s",
                (start, start * copy / 1e3),
                (-6, 4),
                textcoords="offset points",
                horizontalalignment="right",
                fontsize=9,
                bbox=_PLAIN,
            )
            kinds = dict.fromkeys((provider, which) for _, _, provider, which in points)
            for kind in kinds:
                chosen = np.array([(x, y) for x, y, *names in points if tuple(names) == kind])
                colour, marker = PASS_STYLES.get(kind[1], (PURPLE, "D"))
                style: dict[str, Any] = {"color": "none", "mec": "#aaaaaa", "mew": 0.9}
                if kind[0] == OURS:
                    style = {"color": colour, "mec": "white", "mew": 0.5}
                axes.plot(*chosen.T, ls="", marker=marker, ms=5.5, **style)
            axes.grid()
            axes.set_xlabel("arithmetic intensity (FLOP / byte)")
            axes.set_ylabel("rate (TFLOP/s)")
            handles = []
            for which, (colour, marker) in PASS_STYLES.items():
                if any(p[3] == which for p in points):
                    style = {"ls": "", "marker": marker, "markersize": 6}
                    handles.append(Line2D([], [], color=colour, label=f"dcconv, {which}", **style))
                    handles.append(
                        Line2D(
                            [], [], color="none", mec="#aaaaaa", label=f"F.conv2d, {which}", **style
                        )
                    )
            figure.legend(
                handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9
            )
            charts.append(
                Chart(
                    _name("ops-roofline", setting, groups),
                    f"Arithmetic intensity against TFLOP/s, {title}.",
                    _png(figure),
                )
            )
    return charts


def _multiples(records: Iterable[Record], provider: str, what: str) -> float | None:
    """Return the mean of a provider's bytes as multiples of x + y."""
    found = []
    for record in records:
        facts = record.facts
        unit = float(facts.get("x_bytes") or 0) + float(facts.get("y_bytes") or 0)
        value = readme.size(record, what, _provider(record, provider))
        if value is not None and unit:
            found.append(value / unit)
    return statistics.fmean(found) if found else None


def _bars(
    axes: Axes,
    values: dict[tuple[str, str], float],
    names: Sequence[str],
    providers: Sequence[str],
    colours: dict[str, str],
) -> None:
    """Draw a group of bars per name, each with its number, from the top."""
    step = 0.8 / len(providers)
    for (name, provider), value in values.items():
        y = names.index(name) + (providers.index(provider) - (len(providers) - 1) / 2) * step
        axes.barh(y, value, step * 0.86, color=colours[provider])
        axes.annotate(
            f"{value:.2f}",
            (value, y),
            (3, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=7.5,
        )
    axes.set_xlim(0, max(values.values()) * 1.15)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


MEMORY = {"kept": "kept for backward", "peak": "peak during forward and backward"}
MEMORY_PROVIDERS = (OURS, CONV2D, FORMULA, EAGER)


def memory_charts(results: Results) -> list[Chart]:
    """Draw bytes kept for backward and at the peak as multiples of x + y: a file per dtype."""
    records = [r for r in results.get("ops", ()) if r.row.get("pass") == BOTH]
    groups = readme.settings(records, passes=False)
    charts = []
    for setting, rows in groups.items():
        classes = readme.by_class(rows)
        found = {
            what: {
                (name, provider): value
                for name, chosen in classes.items()
                for provider in MEMORY_PROVIDERS
                if (value := _multiples(chosen, provider, what)) is not None
            }
            for what in MEMORY
        }
        panels = {what: values for what, values in found.items() if values}
        if not panels:
            continue
        names = [n for n in classes if any(n == name for v in panels.values() for name, _ in v)]
        title = readme.title_of(setting, groups)
        with _canvas(
            1.7 + 0.72 * len(names),
            f"Memory of a training step through one layer, {title}",
            f"{readme.device_name(rows)}; bytes as multiples of input + output, mean by class",
        ) as figure:
            grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
            for axes, (what, values) in zip(grid[0], panels.items(), strict=True):
                _bars(axes, values, names, MEMORY_PROVIDERS, COLOURS)
                axes.set_title(MEMORY[what], loc="left")
                axes.set_xlabel("bytes / (bytes of x + bytes of y)")
            grid[0][0].set_ylabel("class of layers")
            figure.legend(
                handles=[
                    Patch(color=COLOURS[name], label=LABELS[name])
                    for name in MEMORY_PROVIDERS
                    if any(p == name for v in panels.values() for _, p in v)
                ],
                loc="outside lower center",
                ncols=4,
                fontsize=9,
            )
            charts.append(
                Chart(
                    _name("ops-memory", setting, groups),
                    f"Bytes kept and at the peak over x + y by class of layers, {title}.",
                    _png(figure),
                )
            )
    return charts


NETWORK_PANELS = {"time": "time of a step", "peak": "peak memory"}
NETWORK_COLOURS = {OURS: BLUE, readme.REFERENCE: GREY}


def network_charts(results: Results) -> list[Chart]:
    """Draw the step time and peak memory of converted networks over the plain network's."""
    records = results.get("networks", ())
    groups = readme.settings(records, passes=False)
    charts = []
    for setting, rows in groups.items():
        operators = len({str(r.row.get("operator")) for r in rows}) > 1

        def label(record: Record, operators: bool = operators) -> str:
            parts = [readme.network_label(record), str(record.row.get("pass"))]
            return "\n".join(parts + ([str(record.row.get("operator"))] if operators else []))

        panels: dict[str, dict[tuple[str, str], float]] = {}
        for record in rows:
            for provider in NETWORK_COLOURS:
                name = _provider(record, provider)
                for what in NETWORK_PANELS:
                    value = (
                        record.ratio(name, readme.PLAIN)
                        if what == "time"
                        else readme.size_over(record, what, name, readme.PLAIN)
                    )
                    if value is not None:
                        panels.setdefault(what, {})[label(record), provider] = value
        if not panels:
            continue
        names = list(dict.fromkeys(label(r) for r in rows))
        names = [n for n in names if any(n == name for v in panels.values() for name, _ in v)]
        title = readme.title_of(setting, groups)
        with _canvas(
            1.7 + 0.5 * len(names),
            f"Networks converted to decoupled layers, {title}",
            f"{readme.device_name(rows)}; as multiples of the plain network's step",
        ) as figure:
            grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
            for axes, what in zip(grid[0], panels, strict=True):
                _bars(axes, panels[what], names, list(NETWORK_COLOURS), NETWORK_COLOURS)
                axes.axvline(1, color=BLACK, linewidth=1.2)
                axes.set_title(NETWORK_PANELS[what], loc="left")
                axes.set_xlabel(f"{what} / {what} of the plain network")
            figure.legend(
                handles=[
                    Patch(
                        color=colour, label="converted, dcconv" if n == OURS else "converted, eager"
                    )
                    for n, colour in NETWORK_COLOURS.items()
                ],
                loc="outside lower center",
                ncols=2,
                fontsize=9,
            )
            charts.append(
                Chart(
                    _name("networks", setting, groups),
                    f"Step time and peak memory of converted networks over plain ones, {title}.",
                    _png(figure),
                )
            )
    return charts


AXIS_LABELS = {
    "batch": "batch (images)",
    "image": "height and width (pixels)",
    "channels": "channels",
    "threads": "threads",
}


def _draw_scaling(axes: Axes, lines: Sequence[readme.Line]) -> None:
    for line in lines:
        exponent = line.exponent and f": {line.exponent}"
        axes.plot(
            *np.array(line.points).T,
            color=COLOURS[line.provider],
            marker="os^D"[readme.SCALING_PROVIDERS.index(line.provider)],
            markersize=5,
            label=LABELS[line.provider] + exponent,
        )
    values = sorted({value for line in lines for value, _ in line.points})
    times = [time for line in lines for _, time in line.points]
    _log_axis(axes, "x", values[0] / 1.15, values[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(values))
    _log_axis(axes, "y", min(times) / 1.3, max(times) * 1.3)
    axes.grid()
    axes.set_xlabel(AXIS_LABELS.get(lines[0].axis, lines[0].axis))
    axes.set_ylabel("time (ms)")
    axes.legend(fontsize=8)


def scaling_charts(results: Results) -> list[Chart]:
    """Draw time against what grows, with fitted exponents: a file per layer, dtype and pass."""
    groups = readme.settings(results.get("scaling", ()), threads=False)
    charts = []
    for setting, rows in groups.items():
        lines = readme.scaling_lines(rows)
        for rest in dict.fromkeys(line.rest for line in lines):
            chosen = [line for line in lines if line.rest == rest]
            names = list(dict.fromkeys(line.axis for line in chosen))
            title = ", ".join((rest, readme.title_of(setting, groups)))
            columns = min(2, len(names))
            height = -(-len(names) // columns)
            with _canvas(
                1.2 + 3.4 * height,
                f"Time as the work grows, {title}",
                f"{readme.device_name(rows)}; in the legend: exponents fitted to the points",
            ) as figure:
                grid = figure.subplots(height, columns, squeeze=False)
                for axes, name in zip(grid.flat, names, strict=False):
                    _draw_scaling(axes, [line for line in chosen if line.axis == name])
                for axes in grid.flat[len(names) :]:
                    axes.set_axis_off()
                stem = f"scaling-{rest.replace(', ', '-').replace(' ', '-')}"
                caption = f"Time against {', '.join(names)}, {title}."
                charts.append(Chart(_name(stem, setting, groups), caption, _png(figure)))
    return charts


def draw(results: Results) -> list[Chart]:
    """Draw every chart that the records have data for."""
    return [
        chart
        for charts in (ratio_charts, roofline_charts, memory_charts, network_charts, scaling_charts)
        for chart in charts(results)
    ]
