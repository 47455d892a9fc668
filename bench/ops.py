"""Time, accuracy and memory of the operator, layer by layer, beside what there is without it.

A row is a layer, an operator, a mode, a dtype, a layout and a pass; all its providers are timed
in one run, in rounds (bench/timing.py holds the protocol). Pass fwd runs without gradients; bwd is
the backward alone; fwd+bwd runs the forward for training and computes the gradients of x, weight
and, where there is one, radius, for a fixed random cotangent. F.conv2d, the floor, has gradients of
x and weight. Mode fixed has a radius per filter and a given mean norm, batch computes the mean norm
in the call, with its gradient, and no-rho is an operator without radius. What is compiled is
compiled once per case for its exact shapes, outside the timed rounds.

Before a provider is timed its results are compared with the float64 reference (bench/accuracy.py);
a wrong one gets its error printed in place of a time, and the exit status is 1. GB/s, TFLOP/s and
the share of the roofline are those of the least work of the row (bench/cost.py), against ceilings
measured when the run starts.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from bench import options as shared
from bench.accuracy import Gate, make_gate
from bench.cases import MODES, OPERATORS, Case, Inputs, Operator, find_operator, make_inputs, select
from bench.cost import Ceilings, cost, measure_ceilings
from bench.layers import (
    CLASSES,
    DEFAULT_BATCH,
    OPERATOR,
    Layer,
    distinct_layers,
    layer_classes,
)
from bench.memory import chain_kept, layer_kept, peak_bytes
from bench.options import BACKWARD, BOTH, FORWARD, INTERRUPTED, LAYOUTS, PASSES
from bench.providers import (
    BASELINES,
    OURS,
    PROVIDERS,
    Function,
    backward,
    forward,
    strategies_of,
    strategy_provider,
)
from bench.providers import (
    run as run_pass,
)
from bench.records import Record
from bench.tables import first_own, show
from bench.timing import Candidate, Protocol, Staged, Stopwatch, Timing
from dcconv import backends
from dcconv.call.rule import STRATEGIES
from dcconv.call.strategy import NEW_NAMES, OLD_NAMES
from dcconv.operator.checks import integer, value_error
from dcconv.operator.numerics import compute_dtype
from dcconv.warn import warn_once

KIND = "ops"

QUICK_LAYERS = ("n8-c64-h56-o64-k3", "n8-c64-h56-o256-k1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    shared.add_common(parser)
    add, names = parser.add_argument, shared.names
    add(
        "--layers",
        type=names,
        metavar="A,B",
        help=f"classes ({', '.join(CLASSES)}) or single layers by name (all)",
    )
    add("--batch", type=int, help="images of layers without a batch of their own (cpu 8, cuda 128)")
    add(
        "--operators",
        type=names,
        metavar="A,B",
        help=f"<magnitude>-<angular> ({OPERATORS[0]}; in class operator {', '.join(OPERATORS)})",
    )
    add("--modes", type=names, metavar="A,B", help=f"{', '.join(MODES)} (class operator: all)")
    add("--layout", type=names, dest="layouts", metavar="A,B", help=", ".join(LAYOUTS))
    add("--passes", type=names, metavar="A,B", help=", ".join(PASSES))
    add("--providers", type=names, metavar="A,B", help=f"baselines: {', '.join(BASELINES)}")
    add(
        "--strategies",
        type=names,
        metavar="A,B",
        help=f"of the backends, each by itself: {', '.join(STRATEGIES)}",
    )
    add("--plans", type=names, help=argparse.SUPPRESS)
    add("--graphs", action="store_true", help="on CUDA, time the replay of captured graphs")


def choose_layers(given: list[str] | None, batch: int, default: tuple[str, ...]) -> list[Layer]:
    """Return the layers that names of classes and layers stand for, each once.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    classes = layer_classes(batch)
    single = {name: layer for name, (layer, _) in distinct_layers(batch).items()}
    found: dict[str, Layer] = {}
    for name in default if given is None else given:
        if name in classes:
            found |= {layer.name: layer for layer in classes[name]}
        elif name in single:
            found[name] = single[name]
        else:
            rule = f"be classes ({', '.join(classes)}) or layers ({', '.join(single)})"
            raise value_error("--layers", rule, repr(name))
    if not found:
        raise value_error("--layers", f"name one or more of {', '.join(classes)}", "nothing")
    return list(found.values())


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return what the options ask for.

    The rows that targets are stated for take all their operators and modes; the other layers take
    one operator, unless more are named.
    """
    quick = options.quick
    classes = layer_classes(options.batch)
    layers = choose_layers(options.layers, options.batch, QUICK_LAYERS if quick else (*classes,))
    with_targets = set(classes[OPERATOR])
    found: dict[Case, None] = {}
    for layer in layers:
        wide = layer in with_targets and not quick
        operators = options.operators or (OPERATORS if wide else OPERATORS[:1])
        modes = options.modes or (MODES if wide else ("fixed", "no-rho"))
        chosen = select([layer], operators, modes, options.dtypes, options.layouts)
        found |= dict.fromkeys(chosen)
    return sorted(found, key=lambda case: (options.dtypes.index(case.dtype),))


def complete(options: argparse.Namespace) -> None:
    """Fill in what was not given and check every value."""
    shared.complete_common(options)
    if options.batch is None:
        options.batch = DEFAULT_BATCH[options.device]
    integer("--batch", options.batch, 1)
    if options.dtypes is None:
        options.dtypes = ["float32"] if options.device == "cpu" else ["bfloat16"]
    for name in options.operators or ():
        find_operator(name)
    if options.plans is not None:
        warn_once(f"--plans is named --strategies, and its plans {NEW_NAMES}")
        options.strategies = [OLD_NAMES.get(name, name) for name in options.plans]
    for option, value, known in (
        ("--operators", options.operators, options.operators),
        ("--modes", options.modes, MODES),
        ("--layout", options.layouts, LAYOUTS),
        ("--passes", options.passes, PASSES),
        ("--providers", options.providers, BASELINES),
        ("--strategies", options.strategies, STRATEGIES),
    ):
        if value is not None:
            shared.check_names(option, value, known or OPERATORS)
    options.layouts = options.layouts or ["channels_last"]
    options.passes = options.passes or [FORWARD, BOTH]
    if options.graphs and options.device != "cuda":
        raise value_error("--graphs", "go with --device cuda", repr(options.device))
    if options.graphs and BACKWARD in options.passes:
        raise value_error("--graphs", "go with passes fwd and fwd+bwd", "bwd")
    if options.providers is None:
        options.providers = [n for n in BASELINES if not (options.quick and PROVIDERS[n].compiles)]
    chosen = options.backends
    if chosen is None:
        chosen = shared.willing_backends(options.device)
    options.own = [OURS + name for name in chosen if name != "reference"]
    options.own += [
        strategy_provider(backend, strategy)
        for backend in chosen
        for strategy in options.strategies or ()
        if strategy in strategies_of(backend)
    ]


def refusal(name: str, device: str, operator: Operator) -> str | None:
    """Return why a provider of ours does not run an operator on a device, or None."""
    backend = PROVIDERS[name].backend
    if backend is None:
        return None
    return backends.why_not(backend, torch.zeros(1, device=device), *operator)


def prepare(
    names: list[str],
    functions: dict[str, Function],
    operator: Operator,
    inputs: Inputs,
    gate: Gate,
    which: str,
) -> dict[str, dict[str, Any]]:
    """Call every provider once, check its results and measure its memory; return the results.

    The first call compiles, where a provider compiles.
    """
    device = inputs.x.device.type
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        reason = refusal(name, device, operator)
        result = results[name] = {"timing": None, "note": reason and f"missing: {reason}"}
        if reason is not None:
            continue
        try:
            result |= check(name, functions[name], inputs, gate, which)
            if result["note"] is None:
                result |= memory(functions[name], inputs, which)
        # Out of memory, a compiler that fails, or a strategy that refuses the case.
        except RuntimeError as failure:
            reason = str(failure).partition("\n")[0].removeprefix("dcconv: ")
            refused = isinstance(failure, NotImplementedError)
            result["note"] = f"{'missing' if refused else 'failed'}: {reason}"
    return results


def check(name: str, function: Function, inputs: Inputs, gate: Gate, which: str) -> dict[str, Any]:
    """Call a provider for the first time; return how long that took, and its errors."""
    start = time.perf_counter()
    found = run_pass(function, inputs, which)
    result: dict[str, Any] = {"first_call": time.perf_counter() - start}
    if PROVIDERS[name].gated:
        errors = result["errors"] = gate.errors(found, which)
        result["note"] = gate.refusal(errors, baseline=not name.startswith(OURS))
    return result


def memory(function: Function, inputs: Inputs, which: str) -> dict[str, Any]:
    """Return a provider's peak, and where a backward follows what it keeps."""
    found: dict[str, Any] = {}
    if which != BACKWARD:
        call = functools.partial(run_pass, function, inputs, which)
        found["peak"] = peak_bytes(call, inputs.x.device.type)
    if which == BOTH:
        found["kept"] = asdict(layer_kept(function, inputs))
        found["chain"] = asdict(chain_kept(function, inputs))
    return found


def candidate(function: Function, inputs: Inputs, which: str) -> Candidate:
    """Return what is timed of a provider: of a backward alone, the forward is not."""
    if which == BACKWARD:
        return Staged(
            functools.partial(forward, function, inputs),
            functools.partial(backward, inputs=inputs),
        )
    return functools.partial(run_pass, function, inputs, which)


def measure(
    case: Case,
    options: argparse.Namespace,
    ceilings: Ceilings,
    watch: Stopwatch,
    protocol: Protocol,
    classes: list[str],
) -> Iterator[Record]:
    """Measure the passes of one case; compiled functions are shared between them."""
    inputs = make_inputs(case, options.device)
    gate = make_gate(case, inputs)
    names = [*options.providers, *options.own]
    functions = {name: PROVIDERS[name].build(case) for name in names}
    x, y = inputs.x, inputs.cotangent
    map_size = compute_dtype(x.dtype).itemsize
    try:
        for which in options.passes:
            results = prepare(names, functions, case.operator, inputs, gate, which)
            timings = watch.interleave(
                {
                    name: candidate(functions[name], inputs, which)
                    for name, result in results.items()
                    if result["note"] is None
                },
                protocol,
            )
            work = cost(case, which)
            floor = ceilings.floor(work)
            for name, timing in timings.items():
                results[name] |= rates(timing, work.flops, work.bytes, floor)
            yield Record(
                kind=KIND,
                row={
                    "layer": case.layer.name,
                    "operator": case.operator.name,
                    "mode": case.mode,
                    "dtype": case.dtype,
                    "layout": case.layout,
                    "pass": which,
                    "threads": torch.get_num_threads(),
                }
                | ({"graphs": True} if options.graphs else {}),
                results=results,
                facts={
                    "classes": classes,
                    "own": first_own(results),
                    "flops": work.flops,
                    "bytes": work.bytes,
                    "floor_ms": floor,
                    "copy_gbps": ceilings.copy_rate / 1e9,
                    "matrix_tflops": ceilings.matrix_rate / 1e12,
                    "x_bytes": x.numel() * x.element_size(),
                    "y_bytes": y.numel() * y.element_size(),
                    "map_bytes": y[:, 0].numel() * case.layer.groups * map_size,
                    "filters": case.layer.o,
                },
            )
    finally:
        # Compiled code of one case is of no use to the next, and Dynamo refuses the ninth.
        torch.compiler.reset()


def rates(timing: Timing, flops: int, moved: int, floor: float) -> dict[str, Any]:
    """Return a timing with the rates it means."""
    return {
        "timing": asdict(timing),
        "gbps": moved / timing.median / 1e6,
        "tflops": flops / timing.median / 1e9,
        "roofline": floor / timing.median,
    }


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, print and store; return 1 if a row is wrong, 130 if interrupted."""
    complete(options)
    cases = cases_of(options)
    if not cases:
        raise value_error("--modes", "fit one of the operators", ", ".join(options.modes))
    sink = shared.Sink(KIND, options, console)
    watch, protocol = shared.stopwatch(options), shared.protocol(options)
    in_classes = distinct_layers(options.batch)
    status = 0
    ceilings: dict[str, Ceilings] = {}
    progress = shared.progress_bar()
    try:
        with progress:
            task = progress.add_task("", total=len(cases) * len(options.passes))
            for case in cases:
                progress.update(task, description=case.name)
                if case.dtype not in ceilings:
                    ceilings[case.dtype] = measure_ceilings(
                        case.dtype, options.device, options.quick
                    )
                classes = in_classes[case.layer.name][1]
                for record in measure(
                    case, options, ceilings[case.dtype], watch, protocol, classes
                ):
                    sink.add(record)
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(sink.records)} rows are finished.", style="yellow")
        status = INTERRUPTED
    show(console, sink.records, options.worst)
    if sink.path is not None:
        console.print(f"Appended to {sink.path}", soft_wrap=True, highlight=False)
    if any(record.wrong for record in sink.records):
        status = status or 1
    return status
