"""Accuracy and cost of every magnitude and angular function, per dtype and backend.

Accuracy: values and derivatives at fixed points, the same for every dtype and backend. b spans
1e-6 to 1e6, rho 0.01 to 1000, the filter norm a 0.01 to 30; c spans -1 to 1 evenly, comes close to
0 and to both ends down to the last float32 before 1, and passes 1 as rounding makes it; k spans
0.05 to 2. float32 is compared with the Python specification in float64, float64 with the formulas
in long double (bench/exact.py). Half precision computes functions in float32 and rounds once, when
it stores: there only the value counts, rounded. An ulp is the distance of two numbers of the dtype
at the true result, for a derivative at the larger of that and value / argument: where a function
saturates no formula keeps its slope beyond that.

A value may be off by 4 ulp for each tanh, log, asin or power in it, 4 at least, and by one more for
the product of a weighting; rounded to half precision by the half ulp of rounding besides. A
derivative obeys the accuracy rule of bench/accuracy.py. A function that does not is shown as wrong,
has no time, and the exit status is 1.

Cost: nanoseconds per output of the operator on a thin 1x1 layer, whose convolution costs little,
where the output fits into L2 and where it does not. That is what the function costs where it is
used, vectorised and fused, and can be measured on every backend. Magnitudes are measured with
angular function cosine (with which linear cancels), angular functions with magnitude sphere;
fwd+bwd computes gradients of x, weight and radius. Beside it, on as many elements: F.conv2d on the
same layer, a copy, PyTorch's tanh and asin.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from bench import exact
from bench import options as shared
from bench.accuracy import Gate, error
from bench.cases import FIXED, NO_RHO, Case, Inputs, Operator, make_inputs
from bench.layers import Layer
from bench.options import BOTH, DTYPES, FORWARD, INTERRUPTED
from bench.providers import ALPHA, BETA, CONV2D, OURS, PROVIDERS, K
from bench.providers import Function as Call
from bench.providers import run as run_pass
from bench.records import Record
from bench.tables import Grid, badness, first_own, notes, number, print_grid
from bench.timing import Protocol, Stopwatch
from dcconv import backends
from dcconv.functional import decoupled_conv2d
from dcconv.operator.functions import angulars, magnitudes, weighted_magnitude, weightings
from dcconv.operator.numerics import (
    ACCURACY_FLOOR,
    ANGLE_DELTA,
    PEER_CAP,
    PEER_FACTOR,
    compute_dtype,
)

KIND = "functions"

REFERENCE = "reference"
VALUE = "value"
MAGNITUDE_PARTS = (VALUE, "d/db", "d/drho", "d/da")
ANGULAR_PARTS = (VALUE, "d/dc", "d/dk")

POWER = 2.5

# Design: every elementary function is within so many ulp.
ELEMENTARY_ULP = 4.0
# Functions with more than one of them: tanh and asin, and the tanh of the denominator; two tanh.
ELEMENTARY_CALLS = {"g-sigmoid": 3, "h-tanh-separate": 2}

#: Thin layers: a quarter of a MiB of float32 output, and 16 MiB. With 16 channels no random c is so
#: near 1 that its slope is capped.
IN_L2, BEYOND_L2 = Layer(1, 16, 32, 64, 1), Layer(1, 16, 256, 64, 1)
FITS = {IN_L2.name: "yes", BEYOND_L2.name: "no"}

LEGEND = (
    "Largest and rms error in ulp of the dtype against the truth of the dtype; allowed: the "
    "largest a value may have. Rule: error by the accuracy rule, relative to the largest value."
)
COST_LEGEND = (
    "Nanoseconds per output element; fits: whether the output fits into L2. Spread: the largest "
    "distance of the 20th and 80th percentile over the median; * noisy: a median uncertain by more "
    "than 10 %."
)

Array = NDArray[Any]
Parts = dict[str, Tensor]


class Function(NamedTuple):
    """A magnitude function h with its weighting, or an angular function g.

    Attributes:
        letter: ``h`` or ``g``.
        of: key of ``dcconv.operator.functions.magnitudes`` or ``angulars``.
        weighting: of a magnitude; ``none`` for an angular function.
    """

    letter: str
    of: str
    weighting: str = "none"

    @property
    def name(self) -> str:
        """The name typed after ``--functions``.

        Example:
            >>> Function("h", "tanh", "product").name, Function("g", "linear").name
            ('h-tanh-product', 'g-linear')
        """
        suffix = "" if self.weighting == "none" else f"-{self.weighting}"
        return f"{self.letter}-{self.of}{suffix}"

    @property
    def is_magnitude(self) -> bool:
        """Whether it is a function of the patch norm."""
        return self.letter == "h"

    @property
    def parts(self) -> tuple[str, ...]:
        """The value and the derivatives by what it depends on."""
        if self.is_magnitude:
            depends = (True, True, magnitudes[self.of].uses_rho, self.weighting != "none")
            return tuple(p for p, has in zip(MAGNITUDE_PARTS, depends, strict=True) if has)
        return ANGULAR_PARTS if angulars[self.of].uses_k else ANGULAR_PARTS[:2]

    def allowed_ulp(self, dtype: torch.dtype) -> float:
        """Return how many ulp its value may be off."""
        ulp = ELEMENTARY_ULP * ELEMENTARY_CALLS.get(self.name, 1)
        ulp += self.weighting != "none"
        wide = compute_dtype(dtype)
        if wide == dtype:
            return ulp
        return 0.5 + ulp * torch.finfo(wide).eps / torch.finfo(dtype).eps


#: Every function by its name.
FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        *(
            Function("h", name, weighting.name)
            for name in magnitudes
            for weighting in weightings.values()
            if weighting.only_with in (None, name)
        ),
        *(Function("g", name) for name in angulars),
    )
}


def points(function: Function) -> tuple[Tensor, ...]:
    """Return where a function is evaluated: a, b, rho or c, k, exact in float32, as float64."""
    if function.is_magnitude:
        b = torch.logspace(-6, 6, 2048, dtype=torch.float64)
        rho = torch.tensor([0.01, 0.31, 1.0, 1.7, 40.0, 1000.0])
        a = torch.tensor([0.01, 0.3, 1.0, 3.0, 30.0])
        columns = torch.cartesian_prod(a, b.float(), rho).T
    else:
        near_zero = torch.logspace(-6, -1, 2000, dtype=torch.float64)
        near_end = 1 - torch.logspace(-7, -1, 2000, dtype=torch.float64)
        # float32 has 2^-24 between its numbers below 1. What 16 bits round passes 1 by 7e-4.
        last = 1 - torch.arange(64, dtype=torch.float64) * 2.0**-24
        beyond = torch.tensor([1 + 2.0**-23, 1 + 2.0**-20, 1.0007], dtype=torch.float64)
        positive = torch.cat((near_zero, near_end, last, beyond))
        even = torch.linspace(-1, 1, 20001, dtype=torch.float64)
        c = torch.cat((even, positive, -positive)).float()
        columns = torch.cartesian_prod(c, torch.tensor([0.05, 0.3, 1.0, 2.0])).T
    return tuple(column.double().contiguous() for column in columns)


def parts_of(function: Function, found: Sequence[Any]) -> dict[str, Any]:
    """Return by name what a function has of the value and all derivatives, in their order."""
    every = MAGNITUDE_PARTS if function.is_magnitude else ANGULAR_PARTS
    named = dict(zip(every, found, strict=True))
    return {part: named[part] for part in function.parts}


def specification(function: Function, at: Sequence[Tensor], delta: float) -> Parts:
    """Evaluate the Python specification and its derivatives by autograd, in the points' dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in at]
    if function.is_magnitude:
        a, b, rho = leaves
        value = weighted_magnitude(function.of, function.weighting, a, b, rho, ALPHA, BETA)
        by = [b, rho, a]
    else:
        c, k = by = leaves
        value = angulars[function.of].value(c, k, POWER, delta)
    value = value + 0.0 * by[0] if not value.requires_grad else value
    grads = torch.autograd.grad(value.sum(), by, allow_unused=True, materialize_grads=True)
    return parts_of(function, (value.detach(), *grads))


def compiled(function: Function, at: Sequence[Tensor], delta: float) -> Parts:
    """Evaluate the functions of the shipping CPU kernels."""
    if function.is_magnitude:
        op = torch.ops.dcconv.magnitude_grad
        found = op(function.of, function.weighting, *at, ALPHA, BETA)
    else:
        found = torch.ops.dcconv.angular_grad(function.of, *at, POWER, delta)[:3]
    return parts_of(function, found)


#: How a backend's functions are evaluated one by one, where they can be.
EVALUATE: dict[str, Callable[[Function, Sequence[Tensor], float], Parts]] = {
    "cpu": compiled,
    REFERENCE: specification,
}


@dataclass(frozen=True)
class Truth:
    """The true parts at the points of a function, rounded to the compute dtype first.

    Attributes:
        at: the points in the compute dtype, on the device.
        parts: true results, float64 or long double.
        units: by part, the number at which an ulp is taken.
        peer: the specification in the compute dtype, which the accuracy rule asks for.
    """

    at: tuple[Tensor, ...]
    parts: dict[str, Array]
    units: dict[str, Array]
    peer: Parts


def make_truth(function: Function, dtype: torch.dtype, device: str) -> Truth | None:
    """Evaluate a function truly; None where it is not written down, or this platform cannot."""
    at, wide, delta = points(function), compute_dtype(dtype), ANGLE_DELTA[dtype]
    arguments = ("d/da", "d/db", "d/drho") if function.is_magnitude else ("d/dc", "d/dk")
    by = dict(zip(arguments, at, strict=True))
    if wide == torch.float64:
        if exact.why_not_function(function.of, function.is_magnitude) is not None:
            return None
        if function.is_magnitude:
            a, b, rho = (t.numpy() for t in at)
            found = exact.magnitude(function.of, function.weighting, a, b, rho, ALPHA, BETA)
        else:
            c, k = (t.numpy() for t in at)
            found = exact.angular(function.of, c, k, POWER, delta)
        parts = parts_of(function, found)
    else:
        parts = {n: t.numpy() for n, t in specification(function, at, delta).items()}
    units = {}
    for name, true in parts.items():
        size = np.abs(true)
        if name != VALUE:
            argument = np.abs(by[name].numpy())
            ratio = np.divide(
                np.abs(parts[VALUE]), argument, out=np.zeros_like(size), where=argument > 0
            )
            size = np.maximum(size, ratio)
        units[name] = size
    placed = tuple(t.to(device, wide) for t in at)
    return Truth(placed, parts, units, specification(function, placed, delta))


def ulps(found: Tensor, truth: Array, unit: Array) -> NDArray[np.float64]:
    """Return errors in ulp of ``found``'s dtype, taken at the numbers ``unit``.

    Beyond the largest number of the dtype infinity is right, and whatever else is not finite is
    infinitely wrong.

    Example:
        >>> one = np.array([1.0])
        >>> float(ulps(torch.tensor([1 + 2.0**-22]), one, one)[0])
        2.0
    """
    info = torch.finfo(found.dtype)
    _, exponent = np.frexp(unit)
    lowest = int(np.frexp(info.tiny)[1])
    exponent = np.where(unit > 0, np.maximum(exponent, lowest), lowest)
    spacing = np.ldexp(unit.dtype.type(info.eps), exponent - 1)
    rounded = torch.from_numpy(truth.astype(np.float64)).to(found.dtype)
    right = (rounded == found.cpu()).numpy() & ~rounded.isfinite().numpy()
    numbers = found.double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        errors = np.abs(numbers.astype(truth.dtype) - truth) / spacing
    errors = np.where(right, 0.0, np.where(np.isfinite(numbers), errors, np.inf))
    return np.asarray(errors, dtype=np.float64)


def check(
    function: Function, backend: str, dtype: torch.dtype, truth: Truth
) -> tuple[dict[str, Any], list[str]]:
    """Measure the accuracy of a backend's function; return errors by part, and what is wrong."""
    found = EVALUATE[backend](function, truth.at, ANGLE_DELTA[dtype])
    names = [VALUE] if dtype != compute_dtype(dtype) else list(function.parts)
    result: dict[str, Any] = {"max_ulp": {}, "rms_ulp": {}, "errors": {}}
    wrong = []
    for name in names:
        stored = found[name].to(dtype)
        off = ulps(stored, truth.parts[name], truth.units[name])
        largest = float(off.max())
        true = torch.from_numpy(truth.parts[name].astype(np.float64))
        # Nothing relative can be said of what the dtype cannot hold.
        held = true.to(dtype).isfinite()
        relative = error(stored.cpu()[held], true[held])
        result["max_ulp"][name] = largest
        result["rms_ulp"][name] = float(np.sqrt(np.mean(off**2)))
        result["errors"][name] = relative
        if name == VALUE:
            allowed = function.allowed_ulp(dtype)
            if not largest <= allowed:
                wrong.append(f"value off by {largest:.3g} ulp, allowed {allowed:.3g}")
            continue
        floor = ACCURACY_FLOOR[dtype]
        peer = error(truth.peer[name].cpu(), true)
        allowed = PEER_FACTOR * min(peer, PEER_CAP * floor) + floor
        if not relative <= allowed:
            wrong.append(f"{name} off by {relative:.1e}, allowed {allowed:.1e}")
    return result, wrong


def operator(function: Function, backend: str) -> Call:
    """Return the operator that a function's cost is measured by, on a thin 1x1 layer."""
    magnitude, angular = _names(function)

    def call(x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None) -> Tensor:
        return decoupled_conv2d(
            x,
            weight,
            magnitude=magnitude,
            angular=angular,
            weighting=function.weighting,
            alpha=ALPHA,
            beta=BETA,
            k=K,
            power=POWER,
            radius=1.0 if radius is None else radius,
            norm_mean=norm_mean,
            backend=backend,
        )

    return call


def case_of(function: Function, layer: Layer, dtype: str) -> Case:
    """Return the case whose inputs the operator of a function gets."""
    uses_rho = function.is_magnitude and magnitudes[function.of].uses_rho
    return Case(layer, Operator(*_names(function)), FIXED if uses_rho else NO_RHO, dtype)


def operator_gate(function: Function, inputs: Inputs, dtype: torch.dtype) -> Gate:
    """Evaluate the operator by the reference in float64 and in the dtype, for the accuracy rule."""
    call = operator(function, REFERENCE)
    truth = run_pass(call, inputs.double(), BOTH)
    peer = run_pass(call, inputs, BOTH)
    floor = ACCURACY_FLOOR[dtype]
    loosest = PEER_FACTOR * PEER_CAP * floor + floor
    allowed = {
        name: PEER_FACTOR * min(error(peer[name], truth[name]), PEER_CAP * floor) + floor
        for name in truth
    }
    return Gate(truth, allowed, loosest)


def allowed_to_run(backend: str, device: str, function: Function | None = None) -> str | None:
    """Return why a backend does not run, or not with a function, on a device, or None."""
    x = torch.zeros(1, device=device)
    if function is None:
        return backends.why_not(backend, x)
    return backends.why_not(backend, x, *_names(function), function.weighting)


def _names(function: Function) -> tuple[str, str]:
    """Return the magnitude and angular function of the operator that measures a function."""
    return (function.of, "cosine") if function.is_magnitude else ("sphere", function.of)


def title(backend: str) -> str:
    """Return the key of a backend's results."""
    return backend if backend == REFERENCE else OURS + backend


def assess(
    function: Function, dtype: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return accuracy, and why there is none, of every backend asked for."""
    kind = DTYPES[dtype]
    inputs = make_inputs(case_of(function, IN_L2, dtype), options.device)
    gate = operator_gate(function, inputs, kind)
    truth = make_truth(function, kind, options.device)
    results: dict[str, dict[str, Any]] = {}
    for backend in options.backends:
        result = results[title(backend)] = {"timing": None, "note": None}
        reason = allowed_to_run(backend, options.device, function)
        if reason is not None:
            result["note"] = f"missing: {reason}"
            continue
        wrong: list[str] = []
        if backend in EVALUATE and truth is not None:
            found, wrong = check(function, backend, kind, truth)
            result |= found
        refused = None
        if backend != REFERENCE:
            errors = gate.errors(run_pass(operator(function, backend), inputs, BOTH), BOTH)
            refused = gate.refusal(errors, baseline=False)
            result["errors"] = result.get("errors", {}) | errors
        wrong += [] if refused is None else [refused.removeprefix("wrong: ")]
        if wrong:
            result["note"] = f"wrong: {'; '.join(wrong)}"
    return results


def measure(
    function: Function,
    dtype: str,
    layer: Layer,
    which: str,
    assessed: dict[str, dict[str, Any]],
    options: argparse.Namespace,
    watch: Stopwatch,
    protocol: Protocol,
) -> Record:
    """Time a function on one layer, unless it is wrong; the yardsticks beside it."""
    case = case_of(function, layer, dtype)
    inputs = make_inputs(case, options.device)
    results = {name: dict(result) for name, result in assessed.items()}
    candidates: dict[str, Callable[[], object]] = {
        title(backend): partial(run_pass, operator(function, backend), inputs, which)
        for backend in options.backends
        if results[title(backend)]["note"] is None
    }
    candidates[CONV2D] = partial(run_pass, PROVIDERS[CONV2D].build(case), inputs, which)
    if which == FORWARD:
        source = torch.tanh(inputs.cotangent)
        target = torch.empty_like(source)
        candidates |= {
            "copy": partial(target.copy_, source),
            "tanh": partial(torch.tanh, source),
            "asin": partial(torch.asin, source),
        }
    elements = inputs.cotangent.numel()
    for name, timing in watch.interleave(candidates, protocol).items():
        result = results.setdefault(name, {"note": None})
        result |= {"timing": asdict(timing), "ns": timing.median * 1e6 / elements}
    return Record(
        kind=KIND,
        row={
            "function": function.name,
            "dtype": dtype,
            "pass": which,
            "points": layer.name,
            "threads": torch.get_num_threads(),
        },
        results=results,
        facts={
            "elements": elements,
            "own": first_own(results),
            "allowed_ulp": function.allowed_ulp(DTYPES[dtype]),
        },
    )


def accuracy_grid(records: Sequence[Record]) -> Grid:
    """Return errors, one line per function, part, dtype and backend."""
    cells: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        function, dtype = record.row["function"], record.row["dtype"]
        for name, result in record.results.items():
            for part, largest in result.get("max_ulp", {}).items():
                cells[function, part, dtype, name] = [
                    _ulp(largest),
                    number(record.facts["allowed_ulp"]) if part == VALUE else "",
                    _ulp(result["rms_ulp"][part]),
                    f"{result['errors'][part]:.1e}",
                    "wrong" if f"{part} off" in str(result["note"]) else "",
                ]
    header = ["function", "part", "dtype", "backend", "max ulp", "allowed", "rms ulp", "rule", ""]
    return Grid("Accuracy", header, [[*key, *line] for key, line in cells.items()], 4)


def _ulp(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def cost_grid(records: Sequence[Record], worst: bool = False) -> Grid:
    """Return nanoseconds per element, one line per function, dtype, pass and size."""
    names = list(dict.fromkeys(name for record in records for name in record.results))
    rows = list(records)
    if worst:
        rows.sort(key=lambda record: -badness(record, _ns(record, record.facts["own"])))
    cells = []
    for record in rows:
        row, spread = record.row, record.spread
        texts = []
        for name in names:
            ns, note = _ns(record, name), (record.results.get(name) or {}).get("note")
            texts.append(number(ns, 3) if ns is not None else str(note or "").partition(":")[0])
        noise = "" if spread is None else f"{100 * spread:.0f} %" + ("*" if record.noisy else "")
        fits = FITS[row["points"]]
        cells.append([row["function"], row["dtype"], row["pass"], fits, *texts, noise])
    header = ["function", "dtype", "pass", "fits", *names, "spread"]
    return Grid("Cost, ns per element", header, cells, 4)


def _ns(record: Record, name: str | None) -> float | None:
    value: float | None = record.results.get(name or "", {}).get("ns")
    return value


def show(console: Console, records: Sequence[Record], worst: bool = False) -> None:
    """Print both tables and the notes."""
    if not records:
        return
    print_grid(console, accuracy_grid(records), LEGEND)
    print_grid(console, cost_grid(records, worst), COST_LEGEND)
    for line in notes(records):
        console.print(line, markup=False, highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    shared.add_common(parser)
    add, names = parser.add_argument, shared.names
    add("--functions", type=names, metavar="A,B", help=f"{', '.join(FUNCTIONS)} (all)")
    add("--passes", type=names, metavar="A,B", help=f"{FORWARD}, {BOTH} (both)")


def complete(options: argparse.Namespace) -> None:
    """Fill in what was not given and check every value."""
    shared.complete_common(options)
    if options.functions is None:
        options.functions = list(FUNCTIONS)
    if options.passes is None:
        options.passes = [FORWARD, BOTH]
    shared.check_names("--functions", options.functions, FUNCTIONS)
    shared.check_names("--passes", options.passes, (FORWARD, BOTH))
    if options.dtypes is None:
        options.dtypes = ["float32"] if options.quick else list(DTYPES)
    if options.backends is None:
        options.backends = [*shared.willing_backends(options.device), REFERENCE]


def unreachable(options: argparse.Namespace) -> Iterable[str]:
    """Say what has no accuracy although it runs."""
    if "float64" in options.dtypes:
        asked = [FUNCTIONS[name] for name in options.functions]
        reasons = [exact.why_not_function(f.of, f.is_magnitude) for f in asked]
        for reason in dict.fromkeys(filter(None, reasons)):
            yield f"No ulp of float64: {reason}."
    for backend in options.backends:
        if backend not in EVALUATE and allowed_to_run(backend, options.device) is None:
            yield (
                f"Backend {backend} has no op for its functions alone: no ulp; its operator obeys "
                "the accuracy rule or is shown as wrong."
            )


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, print and store; return 1 if a function is wrong, 130 if interrupted."""
    complete(options)
    sink = shared.Sink(KIND, options, console)
    watch, protocol = shared.stopwatch(options), shared.protocol(options)
    layers = (IN_L2,) if options.quick else (IN_L2, BEYOND_L2)
    rows = [(layer, which) for layer in layers for which in options.passes]
    status = 0
    progress = shared.progress_bar()
    try:
        with progress:
            total = len(options.dtypes) * len(options.functions) * len(rows)
            task = progress.add_task("", total=total)
            for dtype in options.dtypes:
                for name in options.functions:
                    progress.update(task, description=f"{name} {dtype}")
                    function = FUNCTIONS[name]
                    assessed = assess(function, dtype, options)
                    for layer, which in rows:
                        sink.add(
                            measure(
                                function, dtype, layer, which, assessed, options, watch, protocol
                            )
                        )
                        progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(sink.records)} rows are finished.", style="yellow")
        status = INTERRUPTED
    show(console, sink.records, options.worst)
    for line in unreachable(options):
        console.print(line, markup=False, highlight=False)
    if sink.path is not None:
        console.print(f"Appended to {sink.path}", soft_wrap=True, highlight=False)
    if any(record.wrong for record in sink.records):
        status = status or 1
    return status
