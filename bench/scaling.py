"""Growth of time with batch, image size, channels and threads, beside the growth of the work.

A sweep changes one axis of a layer and leaves the rest: the batch, the side of the image, input and
output channels together (and groups with them in a depthwise layer), or the threads of PyTorch. A
row is one value of an axis in one pass; all its providers are timed in one run, in rounds
(bench/timing.py holds the protocol). The exponent of time over the axis is fitted by least squares
in log-log, with its standard error, and printed beside the exponent of the row's FLOPs and bytes
(bench/cost.py): cost that grows as the work does has the same exponent, fixed cost a smaller one,
and what falls out of a cache a larger one. Threads have speed-up and parallel efficiency instead.

The results of a sweep's own layer are compared with the float64 reference before the sweep is timed
(bench/accuracy.py); a wrong provider gets its error in place of times, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench import options as shared
from bench.accuracy import Gate, make_gate
from bench.cases import OPERATORS, Case, Inputs, find_operator, make_inputs
from bench.cost import cost
from bench.fit import Fit, fit, speed_ups
from bench.layers import DEFAULT_BATCH, Layer
from bench.ops import candidate, choose_layers, refusal
from bench.options import BOTH, FORWARD, INTERRUPTED, LAYOUTS, PASSES
from bench.providers import BASELINES, CONV2D, OURS, PROVIDERS
from bench.providers import run as run_pass
from bench.records import Record
from bench.tables import Grid, first_own, notes, number, print_grid, time_cell
from bench.timing import Protocol, Stopwatch
from dcconv.operator.checks import value_error

KIND = "scaling"

BATCH, IMAGE, CHANNELS, THREADS = AXES = ("batch", "image", "channels", "threads")

DEFAULT_LAYERS = ("n8-c64-h56-o64-k3", "n8-c64-h56-o256-k1")

#: What the layer's own value is multiplied by.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
QUICK_FACTORS = (0.25, 0.5, 1.0)

LEGEND = "Times are medians in ms; * noisy: a median uncertain by more than 10 %."
FIT_LEGEND = (
    "Exponent of time over the axis with its standard error, and the share of variance that the "
    "line explains; ? where the error is above 0.1 or there are two points only. work: exponents "
    "of FLOPs and bytes."
)
THREADS_LEGEND = "Speed-up over one thread; efficiency: speed-up over the number of threads."


class Sweep(NamedTuple):
    """One axis of one layer.

    Attributes:
        case: the layer that is scaled, with its operator, mode, dtype and layout.
        axis: one of ``AXES``.
        values: of the axis, rising.
    """

    case: Case
    axis: str
    values: tuple[int, ...]

    def at(self, value: int) -> Case:
        """Return the case at a value of the axis."""
        return self.case._replace(layer=scaled(self.case.layer, self.axis, value))


def base_value(layer: Layer, axis: str) -> int:
    """Return a layer's own value of an axis."""
    return {BATCH: layer.n, IMAGE: layer.size, CHANNELS: layer.c}[axis]


def scaled(layer: Layer, axis: str, value: int) -> Layer:
    """Return a layer with another value of an axis; a number of threads is no part of it.

    Example:
        >>> scaled(Layer(8, 64, 56, 256, 1), "channels", 32)
        Layer(n=8, c=32, size=56, o=128, k=1, stride=1, groups=1, dilation=1)
    """
    if axis == BATCH:
        return layer._replace(n=value)
    if axis == IMAGE:
        return layer._replace(size=value)
    if axis == CHANNELS:
        groups = value if layer.groups == layer.c else layer.groups
        return layer._replace(c=value, o=layer.o * value // layer.c, groups=groups)
    assert axis == THREADS
    return layer


def axis_values(layer: Layer, axis: str, factors: Sequence[float], cores: int) -> tuple[int, ...]:
    """Return the values of a sweep: those that the layer can have, each once.

    Example:
        >>> axis_values(Layer(2, 64, 56, 64, 3), "batch", (0.25, 0.5, 1, 2), 4)
        (1, 2, 4)
    """
    if axis == THREADS:
        return tuple(sorted({2**i for i in range(cores.bit_length())} & set(range(1, cores + 1))))
    base = base_value(layer, axis)

    def possible(value: float) -> bool:
        if value != int(value) or value < 1:
            return False
        new = scaled(layer, axis, int(value))
        whole = layer.o * int(value) % layer.c == 0 if axis == CHANNELS else True
        return whole and new.c % new.groups == 0 and new.o % new.groups == 0 and new.y_shape[2] > 0

    return tuple(sorted({int(base * f) for f in factors if possible(base * f)}))


def check_base(
    sweep: Sweep, which: str, providers: Sequence[str], gate: Gate, inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """Return by provider its errors at the layer's own size, and why it is not timed."""
    results: dict[str, dict[str, Any]] = {}
    for name in providers:
        reason = refusal(name, inputs.x.device.type, sweep.case.operator)
        result = results[name] = {"timing": None, "note": reason and f"missing: {reason}"}
        if reason is None and PROVIDERS[name].gated:
            found = run_pass(PROVIDERS[name].build(sweep.case), inputs, which)
            errors = gate.errors(found, which)
            result["errors"] = errors
            result["note"] = gate.refusal(errors, baseline=not name.startswith(OURS))
    return results


def measure(
    sweep: Sweep,
    which: str,
    checked: dict[str, dict[str, Any]],
    watch: Stopwatch,
    protocol: Protocol,
    device: str,
    keep: Callable[[Record], None],
) -> None:
    """Time every value of a sweep in one pass; each row is kept as soon as it is finished."""
    threads = torch.get_num_threads()
    try:
        for value in sweep.values:
            if sweep.axis == THREADS:
                torch.set_num_threads(value)
            case = sweep.at(value)
            inputs = make_inputs(case, device)
            results = {name: dict(result) for name, result in checked.items()}
            try:
                timings = watch.interleave(
                    {
                        name: candidate(PROVIDERS[name].build(case), inputs, which)
                        for name, result in results.items()
                        if result["note"] is None
                    },
                    protocol,
                )
            finally:
                # Compiled code of one size is of no use to the next, and Dynamo refuses the ninth.
                torch.compiler.reset()
            for name, timing in timings.items():
                results[name]["timing"] = asdict(timing)
            work = cost(case, which)
            keep(
                Record(
                    kind=KIND,
                    row={
                        "layer": sweep.case.layer.name,
                        "operator": case.operator.name,
                        "mode": case.mode,
                        "dtype": case.dtype,
                        "layout": case.layout,
                        "pass": which,
                        "axis": sweep.axis,
                        "value": value,
                        "threads": torch.get_num_threads(),
                    },
                    results=results,
                    facts={
                        "own": first_own(results),
                        "flops": work.flops,
                        "bytes": work.bytes,
                    },
                )
            )
    finally:
        torch.set_num_threads(threads)


class Line(NamedTuple):
    """The rows of one axis of a layer in one pass, in the order of the values.

    Attributes:
        names: layer, operator, mode, dtype, layout, pass and axis.
        records: one per value.
    """

    names: tuple[str, ...]
    records: list[Record]

    def of(self, provider: str) -> list[tuple[int, float]]:
        """Return values and medians of a provider, where it has them."""
        found = ((r.row["value"], r.median(provider)) for r in self.records)
        return [(value, median) for value, median in found if median is not None]

    def fit(self, provider: str) -> Fit | None:
        """Fit the exponent of a provider's time; None for threads and for fewer than two values."""
        return None if self.names[-1] == THREADS else fit(self.of(provider))

    def work(self, fact: str) -> Fit | None:
        """Fit the exponent of ``flops`` or ``bytes``."""
        if self.names[-1] == THREADS:
            return None
        return fit((r.row["value"], r.facts[fact]) for r in self.records)


def lines(records: Sequence[Record]) -> list[Line]:
    """Group rows into the lines of a chart; what follows from them is fitted anew, never stored.

    Rows of other thread counts are other lines, except on the axis of threads.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for record in records:
        row = record.row
        names = [
            row[key] for key in ("layer", "operator", "mode", "dtype", "layout", "pass", "axis")
        ]
        key = (*names, None if row["axis"] == THREADS else row["threads"])
        found.setdefault(key, Line(tuple(names), [])).records.append(record)
    for line in found.values():
        line.records.sort(key=lambda record: int(record.row["value"]))
    return list(found.values())


def _providers(records: Sequence[Record]) -> list[str]:
    present = {name for record in records for name in record.results}
    return [name for name in PROVIDERS if name in present]


def _identity(names: Sequence[str]) -> list[str]:
    layer, operator, mode, dtype, _, which, axis = names
    return [layer, operator, mode, dtype, which, axis]


HEADER = ["layer", "operator", "mode", "dtype", "pass", "axis"]


def time_grid(found: Sequence[Line]) -> Grid:
    """Return times, one line per value."""
    providers = _providers([record for line in found for record in line.records])
    cells = []
    for line in found:
        for record in line.records:
            times = [time_cell(record, name) for name in providers]
            spread = record.spread
            noise = (
                "" if spread is None else f"{100 * spread:.0f} %" + ("*" if record.noisy else "")
            )
            cells.append([*_identity(line.names), str(record.row["value"]), *times, noise])
    return Grid("Time", [*HEADER, "value", *providers, "spread"], cells, len(HEADER))


def exponent_text(found: Fit | None) -> str:
    """Return an exponent with its standard error, marked where it is poor.

    Example:
        >>> exponent_text(Fit(1.02, 0.004, 0.999, 5)), exponent_text(Fit(0.7, 0.2, 0.8, 4))
        ('1.02 ± 0.00', '0.70 ± 0.20 ?')
    """
    if found is None:
        return ""
    error = "" if found.error is None else f" ± {found.error:.2f}"
    return f"{found.exponent:.2f}{error}{' ?' if found.poor else ''}"


def fit_grid(found: Sequence[Line], worst: bool = False) -> Grid:
    """Return the exponents of time and work, one line per axis of a layer and pass."""
    fitted = [line for line in found if line.names[-1] != THREADS and len(line.records) > 1]
    providers = _providers([record for line in fitted for record in line.records])
    own = next((name for name in providers if name.startswith(OURS)), None)
    if worst and own is not None:
        name = own

        def excess(line: Line) -> float:
            time, work = line.fit(name), line.work("flops")
            return work.exponent - time.exponent if time is not None and work is not None else 0.0

        fitted.sort(key=excess)
    cells = []
    for line in fitted:
        values = [str(record.row["value"]) for record in line.records]
        texts = [f"{values[0]} to {values[-1]}"]
        for fact in ("flops", "bytes"):
            work = line.work(fact)
            texts.append(number(None if work is None else work.exponent))
        for name in providers:
            time = line.fit(name)
            texts += [exponent_text(time), number(None if time is None else time.r2, 3)]
        cells.append([*_identity(line.names), *texts])
    header = [*HEADER, "values", "work", "bytes"]
    for name in providers:
        header += [name, "R²"]
    return Grid("Exponents", header, cells, len(HEADER))


def threads_grid(found: Sequence[Line]) -> Grid:
    """Return speed-up and efficiency, one line per number of threads."""
    chosen = [line for line in found if line.names[-1] == THREADS]
    providers = _providers([record for line in chosen for record in line.records])
    cells = []
    for line in chosen:
        scaled_by = {name: {s.threads: s for s in speed_ups(line.of(name))} for name in providers}
        for record in line.records:
            value = record.row["value"]
            texts = []
            for name in providers:
                one = scaled_by[name].get(value)
                texts.append("" if one is None else f"{one.speed_up:.2f}")
                texts.append("" if one is None else f"{100 * one.efficiency:.0f} %")
            cells.append([*_identity(line.names), str(value), *texts])
    header = [*HEADER, "value"]
    for name in providers:
        header += [name, "efficiency"]
    return Grid("Threads", header, cells, len(HEADER))


def show(console: Console, records: Sequence[Record], worst: bool = False) -> None:
    """Print all tables of a run."""
    if not records:
        return
    found = lines(records)
    print_grid(console, time_grid(found), LEGEND)
    for grid, legend in (
        (fit_grid(found, worst), FIT_LEGEND),
        (threads_grid(found), THREADS_LEGEND),
    ):
        if grid.cells:
            print_grid(console, grid, legend)
    for line in notes(records):
        console.print(line, markup=False, highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    shared.add_common(parser)
    add, names = parser.add_argument, shared.names
    add(
        "--layers",
        type=names,
        metavar="A,B",
        help=f"classes or single layers by name ({','.join(DEFAULT_LAYERS)})",
    )
    add("--axes", type=names, metavar="A,B", help=f"{', '.join(AXES)} (all; threads on a CPU)")
    add("--operators", type=names, metavar="A,B", help=f"<magnitude>-<angular> ({OPERATORS[0]})")
    add("--mode", metavar="NAME", help="of the radius (the operator's first: fixed, or no-rho)")
    add("--layout", type=names, dest="layouts", metavar="A,B", help=", ".join(LAYOUTS))
    add(
        "--passes",
        type=names,
        metavar="A,B",
        help=f"{', '.join(PASSES)} ({FORWARD},{BOTH}; quick {BOTH})",
    )
    add("--providers", type=names, metavar="A,B", help=f"{', '.join(BASELINES)} ({CONV2D})")


def complete(options: argparse.Namespace) -> None:
    """Fill in what was not given and check every value."""
    shared.complete_common(options)
    on_cpu = options.device == "cpu"
    if options.dtypes is None:
        options.dtypes = ["float32"] if on_cpu else ["bfloat16"]
    if options.axes is None:
        options.axes = list(AXES) if on_cpu else [BATCH, IMAGE, CHANNELS]
    shared.check_names("--axes", options.axes, AXES)
    if THREADS in options.axes and not on_cpu:
        raise value_error("--axes", "leave out threads on a GPU", repr(THREADS))
    for option, name, default, known in (
        ("--operators", "operators", [OPERATORS[0]], None),
        ("--layout", "layouts", ["channels_last"], LAYOUTS),
        ("--passes", "passes", [BOTH] if options.quick else [FORWARD, BOTH], PASSES),
        ("--providers", "providers", [CONV2D], BASELINES),
    ):
        if getattr(options, name) is None:
            setattr(options, name, default)
        given = getattr(options, name)
        shared.check_names(option, given, given or OPERATORS if known is None else known)
    chosen = options.backends
    if chosen is None:
        chosen = shared.willing_backends(options.device)
    options.providers += [OURS + name for name in chosen if name != "reference"]


def sweeps_of(options: argparse.Namespace, cores: int) -> list[Sweep]:
    """Return what the options ask for.

    Raises:
        ValueError: a layer, operator or mode is unknown; the message lists the known ones.
    """
    layers = choose_layers(options.layers, DEFAULT_BATCH[options.device], DEFAULT_LAYERS)
    factors = QUICK_FACTORS if options.quick else FACTORS
    found = []
    for operator in map(find_operator, options.operators):
        mode = operator.modes[0] if options.mode is None else options.mode
        if mode not in operator.modes:
            rule = f"be one of {', '.join(operator.modes)} for {operator.name}"
            raise value_error("--mode", rule, repr(mode))
        for dtype in options.dtypes:
            for layout in options.layouts:
                for layer in layers:
                    case = Case(layer, operator, mode, dtype, layout)
                    found += [
                        Sweep(case, axis, axis_values(layer, axis, factors, cores))
                        for axis in options.axes
                    ]
    return found


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, print and store; return 1 if a provider is wrong, 130 if interrupted."""
    complete(options)
    sink = shared.Sink(KIND, options, console)
    sweeps = sweeps_of(options, sink.at.cores)
    watch, protocol = shared.stopwatch(options), shared.protocol(options)
    status = 0
    checked: dict[tuple[Case, str], dict[str, dict[str, Any]]] = {}
    progress = shared.progress_bar()
    try:
        with progress:
            total = sum(len(sweep.values) for sweep in sweeps) * len(options.passes)
            task = progress.add_task("", total=total)

            def keep(record: Record) -> None:
                sink.add(record)
                progress.advance(task)

            for sweep in sweeps:
                progress.update(task, description=f"{sweep.case.name} {sweep.axis}")
                if (sweep.case, options.passes[0]) not in checked:
                    inputs = make_inputs(sweep.case, options.device)
                    gate = make_gate(sweep.case, inputs)
                    for which in options.passes:
                        checked[sweep.case, which] = check_base(
                            sweep, which, options.providers, gate, inputs
                        )
                    torch.compiler.reset()
                for which in options.passes:
                    results = checked[sweep.case, which]
                    measure(sweep, which, results, watch, protocol, options.device, keep)
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(sink.records)} rows are finished.", style="yellow")
        status = INTERRUPTED
    show(console, sink.records, options.worst)
    if sink.path is not None:
        console.print(f"Appended to {sink.path}", soft_wrap=True, highlight=False)
    if any(record.wrong for record in sink.records):
        status = status or 1
    return status
