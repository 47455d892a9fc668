"""Time, accuracy and kept memory of the operator on the CPU, beside F.conv2d and the formulas.

    python -m bench.operator                      everything: 140 rows
    python -m bench.operator --quick              two layers, float32, nothing compiled
    python -m bench.operator --worst --markdown operator.md --json rows.jsonl

Protocol. A row is a layer, an operator, a mode, a dtype and a pass; all its providers are timed in
one run, in rounds, on two threads (``bench.timing`` holds the details). Tensors are channels_last
with stride 1 and padding k // 2. Pass ``forward`` runs without gradients; ``forward+backward`` runs
the forward for training and computes the gradients of x, weight and, where there is one, radius,
for a fixed random cotangent. F.conv2d, the floor, has gradients of x and weight. Mode ``fixed``
has a radius per channel and a given mean norm, ``batch`` computes the mean norm in the call, with
its gradient, and ``no-rho`` is an operator without radius. The compiled formula is compiled once
per row for its exact shapes (``dynamic=False``), outside the timed rounds.

Before a provider is timed its results are compared with the float64 reference
(``bench.accuracy``); a wrong one gets its error printed in place of a time. Memory
(``bench.memory``) counts what a forward saves for backward.

Ratios are ratios of medians of the same row, and the summary compares geometric means over the
rows of modes ``fixed`` and ``no-rho`` with the targets. Nothing else should run on the machine; the
load at the start is part of every row.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.accuracy import Gate, make_gate
from bench.cases import (
    BOTH,
    DTYPES,
    LAYERS,
    MODES,
    OPERATORS,
    PASSES,
    QUICK_LAYERS,
    Case,
    Inputs,
    make_inputs,
    select,
)
from bench.memory import chain_kept, layer_kept
from bench.providers import DCCONV, PROVIDERS, Function, run
from bench.report import markdown, show, write
from bench.rows import Environment, Result, Row, environment
from bench.timing import Protocol, interleave
from dcconv.checks import choice, integer, number, value_error

# The tables of all providers need this many columns. Where there are fewer, lines wrap: rich would
# shorten numbers.
WIDTH = 170


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    own = argparse.ArgumentParser(
        prog="python -m bench.operator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    own.add_argument("--layers", nargs="+", metavar="N,C,H,O,K", help=" ".join(LAYERS))
    own.add_argument("--operators", nargs="+", metavar="NAME", help=" ".join(OPERATORS))
    own.add_argument("--modes", nargs="+", metavar="NAME", help=" ".join(MODES))
    own.add_argument("--dtypes", nargs="+", metavar="NAME", help=" ".join(DTYPES))
    own.add_argument("--passes", nargs="+", metavar="NAME", help=" ".join(PASSES))
    own.add_argument("--providers", nargs="+", metavar="NAME", help=" ".join(PROVIDERS))
    own.add_argument("--rounds", type=int, help="least rounds of a row (7; quick 5)")
    own.add_argument("--min-time", type=float, help="least seconds of a row (0.7; quick 0.3)")
    own.add_argument("--quick", action="store_true", help="two layers, float32, no compilation")
    own.add_argument("--worst", action="store_true", help="sort by dcconv / F.conv2d")
    own.add_argument("--json", type=Path, metavar="PATH", help="append every row to this file")
    own.add_argument("--markdown", type=Path, metavar="PATH", help="write all tables to this file")
    return own


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not given and check every value.

    Raises:
        ValueError, TypeError: a name is unknown, a number is out of range or a path unusable; the
            message says which and what is known.
    """
    quick = options.quick
    defaults = {
        "layers": QUICK_LAYERS if quick else tuple(LAYERS),
        "operators": tuple(OPERATORS),
        "modes": MODES,
        "dtypes": ("float32",) if quick else tuple(DTYPES),
        "passes": PASSES,
        "providers": tuple(p.name for p in PROVIDERS.values() if (p.quick if quick else p.default)),
        "rounds": 5 if quick else 7,
        "min_time": 0.3 if quick else 0.7,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    known: dict[str, Iterable[str]] = {
        "layers": LAYERS,
        "operators": OPERATORS,
        "modes": MODES,
        "dtypes": DTYPES,
        "passes": PASSES,
        "providers": PROVIDERS,
    }
    for name, names in known.items():
        for value in getattr(options, name):
            choice(f"--{name}", value, names)
    integer("--threads", options.threads, 1)
    integer("--rounds", options.rounds, 1)
    number("--min-time", options.min_time, "be a number of at least 0", 0.0, closed=True)
    for name in ("json", "markdown"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise value_error(f"--{name}", "be a file in an existing folder", path)
    return options


def prepare(
    case: Case, inputs: Inputs, gate: Gate, which: str, functions: dict[str, Function], row: Row
) -> dict[str, Function]:
    """Call every provider once, check its results, and return those worth timing.

    Fills ``row.results``. The first call compiles, where a provider compiles.
    """
    worth = {}
    for name, function in functions.items():
        result = row.results[name] = Result()
        start = time.perf_counter()
        try:
            found = run(function, inputs, which)
        except RuntimeError as failure:
            kind = "missing" if isinstance(failure, NotImplementedError) else "failed"
            reason = str(failure).partition("\n")[0].removeprefix("dcconv: ")
            result.note = f"{kind}: {reason}"
            continue
        result.first_call = time.perf_counter() - start
        if PROVIDERS[name].gated:
            result.errors = gate.errors(found, which)
            result.note = gate.refusal(result.errors, baseline=name != DCCONV)
        del found
        if result.note is None:
            worth[name] = function
            if which == BOTH:
                result.kept = layer_kept(function, inputs)
                result.chain = chain_kept(function, inputs)
    return worth


def measure(
    case: Case, passes: Sequence[str], providers: Sequence[str], protocol: Protocol, at: Environment
) -> Iterator[Row]:
    """Measure the passes of one case; compiled functions are shared between them."""
    inputs = make_inputs(case)
    gate = make_gate(case, inputs)
    functions = {name: PROVIDERS[name].build(case) for name in providers}
    x, y = inputs.x, inputs.cotangent
    try:
        for which in passes:
            row = Row(
                case=case,
                which=which,
                x_bytes=x.numel() * x.element_size(),
                y_bytes=y.numel() * y.element_size(),
                map_bytes=y[:, 0].numel() * torch.float32.itemsize,
                environment=at,
            )
            worth = prepare(case, inputs, gate, which, functions, row)
            timings = interleave(
                {
                    name: functools.partial(run, function, inputs, which)
                    for name, function in worth.items()
                },
                protocol,
            )
            for name, timing in timings.items():
                row.results[name].timing = timing
            yield row
    finally:
        # Compiled code of one case is of no use to the next, and Dynamo refuses the ninth.
        torch.compiler.reset()


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure every case; an interrupt keeps the rows that are done."""
    torch.set_num_threads(options.threads)
    protocol = Protocol(options.rounds, options.min_time)
    cases = select(options.layers, options.operators, options.modes, options.dtypes)
    at = environment()
    console.print(at.sentence, markup=False, highlight=False)
    if at.load > 0.5:
        console.print("The machine is not idle: expect a large spread.", style="yellow")
    if at.cores < at.threads:
        console.print(f"{at.threads} threads share {at.cores} cores.", style="yellow")
    rows: list[Row] = []
    # stdout may go to a file; progress belongs to the person watching.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with progress:
            task = progress.add_task("", total=len(cases) * len(options.passes))
            for case in cases:
                progress.update(task, description=case.name)
                for row in measure(case, options.passes, options.providers, protocol, at):
                    rows.append(row)
                    if options.json is not None:
                        with options.json.open("a", encoding="utf-8") as file:
                            file.write(row.json() + "\n")
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(rows)} rows.", style="yellow")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    own = parser()
    try:
        options = complete(own.parse_args(arguments))
    except (ValueError, TypeError) as wrong:
        print(wrong, file=sys.stderr)
        return 2
    console = Console()
    console.width = max(console.width, WIDTH)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Inductor remarks on its own internals; what matters here ends in a row's note.
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo|functorch)")
        rows = run_all(options, console)
    if not rows:
        console.print("No row matches: these operators have none of these modes.", style="yellow")
        return 1
    show(console, rows, options.worst)
    seconds = time.perf_counter() - start
    first = sum(r.first_call for row in rows for n, r in row.results.items() if n == "compiled")
    text = f"{len(rows)} rows in {seconds:.0f} s, {first:.0f} s of them compilation."
    console.print(text, highlight=False)
    if options.markdown is not None:
        rule = (
            f"At least {options.rounds} interleaved rounds and {options.min_time:g} s a row, "
            "medians; channels_last, stride 1, padding k // 2."
        )
        write(options.markdown, markdown(rows, rule, options.worst))
    return 0


if __name__ == "__main__":
    sys.exit(main())
