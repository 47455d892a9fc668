"""The choice itself: which plans are willing, what is known about their times, what runs.

A call's choice is made once per key and setting, and then found in a dictionary. What is known
comes from a pinned table, else from this user's measurements in benchmark mode, else from the
tables that ship with the package; where nothing is known, the rule decides.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dcconv import native, settings
from dcconv.call.implementations import Plans, namespaces, registry, tuned
from dcconv.call.key import DIRECTIONS, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Key, key_of
from dcconv.call.measure.stopwatch import Stopwatch, compare, cuda_events
from dcconv.call.measure.tables import Cache, Table, Times, read, shipped
from dcconv.call.rule import PASSES, PLANS, fastest, rule
from dcconv.call.saved import DOT
from dcconv.operator.checks import value_error
from dcconv.operator.layout import memory_format
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import library, records
from dcconv.passes.backward import InputSide
from dcconv.passes.records import Taps
from dcconv.warn import warn_once


class Allowed(NamedTuple):
    """Which plans calls may take: names joined by commas, for both gradients unless they differ."""

    names: str = ",".join(PLANS)
    input_gradient: str | None = None
    weight_gradient: str | None = None


class Decision(NamedTuple):
    """A chosen plan, and how it was chosen."""

    plan: str
    source: str
    times: Times


MEASURED = "measured here"

# The process's setting.
_allowed = Allowed(os.environ.get("DCCONV_PLANS") or Allowed().names)

#: What times the plans: ``Callable[[run], milliseconds per call]``.
stopwatch: Stopwatch = cuda_events

#: Where plans are timed. Kernels on CPU tensors are interpreted: their times say nothing of a GPU.
TIMED_DEVICES: tuple[str, ...] = ("cuda",)

# Sizes of x that are measured per kind of call. Images of ever new sizes would be measured for
# ever, and each time the file that has all of them be written again.
MOST_SIZES = 256

_lock = threading.RLock()
_pinned: Table | None = None
_caches: dict[str, Cache] = {}
_shipped: dict[str, Table] = {}

# Choices by the raw facts of a call. Emptied when full: images of ever new sizes would fill it.
# Replaced when tables change: a thread that was choosing meanwhile fills the one it began with.
_MOST_CHOICES = 4096
_choices: dict[tuple[Any, ...], Plans] = {}


def checked_names(argument: str, names: object) -> tuple[str, ...]:
    """Return the plans in a text such as ``A,B``; ValueError if it is none."""
    found = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else ()
    if not found or any(name not in PLANS for name in found):
        raise value_error(
            argument, f"be names out of {', '.join(PLANS)}, joined by commas", repr(names)
        )
    return found


def allowed(
    names: str, *, input_gradient: str | None = None, weight_gradient: str | None = None
) -> AbstractContextManager[None]:
    """Let the calls inside the context choose between some plans only, on every backend with plans.

    The setting belongs to the thread or asyncio task that enters the context, as that of
    ``dcconv.use_backend``; ``DCCONV_PLANS`` sets the process's at import.

    Args:
        names: names joined by commas: ``A`` (library convolution and fused passes), ``B`` (one
            pass), ``G`` (cuDNN graph, cuda backend alone). A gradient that none of them computes is
            left to plan A.
        input_gradient, weight_gradient: the plans of this direction, where they differ; then
            without plan A as a way out.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: by a call inside, with the plans' own sentences, if all refuse.

    Example:
        >>> import dcconv
        >>> with dcconv.backends.plans("A"):
        ...     pass
    """
    checked_names("names", names)
    for argument, value in (
        ("input_gradient", input_gradient),
        ("weight_gradient", weight_gradient),
    ):
        if value is not None:
            checked_names(argument, value)
    return settings.plans.within(Allowed(names, input_gradient, weight_gradient))


def _setting() -> Allowed:
    own: Allowed | None = settings.plans.own()
    return _allowed if own is None else own


def pin_table(path: str | os.PathLike[str] | None) -> None:
    """Choose by one file of measured times and nothing else; nothing is measured or tuned then.

    A call without an entry follows the rule. With a pinned table the same calls take the same
    plans in every process, so it counts under ``torch.use_deterministic_algorithms`` as well.
    Compiled and exported code keeps the plans that it was traced with.

    Args:
        path: a file that benchmark mode wrote; None ends it.

    Raises:
        ValueError: the file cannot be read as a table.

    Example:
        >>> import dcconv
        >>> dcconv.backends.pin_table(None)
    """
    global _pinned, _choices
    table = None
    if path is not None:
        try:
            table, _ = read(Path(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise value_error("path", "be a file of measured times", f"{path}: {error}") from error
    with _lock:
        _pinned = table
        _choices = {}


def _reasons(
    backend: str, operands: Operands, problem: Problem, direction: str, setting: Allowed
) -> dict[str, str | None]:
    """Return by allowed plan why it refuses a direction of a call, None if it does not."""
    own = {INPUT_GRADIENT: setting.input_gradient, WEIGHT_GRADIENT: setting.weight_gradient}
    names = own.get(direction)
    allowed_names = checked_names("DCCONV_PLANS", setting.names if names is None else names)
    if direction != FORWARD and names is None:
        allowed_names = (PASSES, *allowed_names)
    plans = registry[backend]
    return {
        name: plans[name].reason(direction, operands, problem)
        if name in plans
        else f"the {backend} backend has no plan {name}"
        for name in PLANS
        if name in allowed_names
    }


def _willing(
    backend: str, operands: Operands, problem: Problem, direction: str, setting: Allowed
) -> tuple[str, ...]:
    reasons = _reasons(backend, operands, problem, direction, setting)
    willing = tuple([name for name, reason in reasons.items() if reason is None])
    if not willing:
        said = "; ".join([f"{name}: {reason}" for name, reason in reasons.items()])
        raise NotImplementedError(
            f"dcconv: no allowed plan runs the {direction} of this call: {said}"
        )
    return willing


def _known(key: Key, benchmark: bool) -> tuple[str, Times]:
    """Return where the times of a key come from, and the times."""
    pinned = _pinned
    if pinned is not None:
        return "pinned table", pinned.find(key) if pinned.device == key.device else {}
    if benchmark:
        if key.device not in _caches:
            _caches[key.device] = Cache(key.device)
        times = _caches[key.device].table.find(key)
        if times:
            return MEASURED, times
    if key.device not in _shipped:
        _shipped[key.device] = shipped(key.device)
    return "table of this GPU", _shipped[key.device].find(key)


def decide(key: Key, willing: Sequence[str], benchmark: bool) -> Decision:
    """Return the choice from what is known, without measuring."""
    source, times = _known(key, benchmark)
    times = {name: ms for name, ms in times.items() if name in willing}
    if len(willing) == 1:
        return Decision(willing[0], "the only one willing", times)
    name = fastest(times, willing)
    return (
        Decision(rule(key, willing), "by rule", {})
        if name is None
        else Decision(name, source, times)
    )


# Constant for tracing, which cannot see what is pinned.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _measures(device_type: str) -> bool:
    """Whether benchmark mode counts: measured choices and tiles may differ from run to run."""
    return (
        device_type in TIMED_DEVICES
        and _pinned is None
        and not torch.are_deterministic_algorithms_enabled()
    )


# Constant for tracing: tables are not part of a graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _decided_name(key: tuple[Any, ...], willing: tuple[str, ...], benchmark: bool) -> str:
    # A plain tuple: tracing does not make constants of named ones.
    with _lock:
        return decide(Key(*key), willing, benchmark).plan


def _scratch(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    # Tensors with gaps or repeats may lose their layout where strides are only preserved.
    layout = memory_format(t) if t.dim() == 4 else torch.preserve_format
    return t.detach().clone(memory_format=layout)


def _runs(
    operands: Operands, problem: Problem, kept: str, key: Key, willing: Sequence[str]
) -> dict[str, Any]:
    """Return by plan a function that runs a direction of a call, on copies of its tensors."""
    plans = tuned[key.backend]
    operands = Operands._make(_scratch(t) for t in operands)
    if key.direction == FORWARD:
        return {
            name: lambda run=plans[name].forward: run(operands, problem, kept) for name in willing
        }
    layout = memory_format(operands.x, operands.weight)
    x = operands.x.contiguous(memory_format=layout)
    weight = operands.weight.contiguous(memory_format=memory_format(operands.weight))
    # Of the right shapes, layouts and magnitudes.
    _, norm_map, _, grad_u, _ = library.forward(operands, problem, DOT, namespaces[key.backend])
    if key.direction == WEIGHT_GRADIENT:
        return {
            name: lambda run=plans[name].weight_gradient: run(grad_u, x, weight, problem)
            for name in willing
        }
    barrier = problem.norm == NORM_BATCH and problem.norm_grad
    sigma = norm_map.new_ones(()) if barrier else None
    return {
        name: lambda run=plans[name].input_gradient: run(
            InputSide(grad_u, x, weight, Taps(norm_map, norm_map, sigma)), problem
        )
        for name in willing
    }


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which x's GPU is the current one, whose stream its ops run on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _may_measure(x: Tensor) -> bool:
    # A mode that watches every op would see those of the measurement; some are tracers.
    if _get_current_dispatch_mode() is not None:
        return False
    with _on_device(x):
        return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _measure(
    operands: Operands, problem: Problem, kept: str, key: Key, willing: Sequence[str]
) -> None:
    """Time the willing plans of one direction and remember it; the lock is held."""
    with (
        _on_device(operands.x),
        torch.no_grad(),
        torch.profiler.record_function("dcconv: measuring plans"),
    ):
        try:
            times = compare(_runs(operands, problem, kept, key, willing), stopwatch)
        except RuntimeError as error:
            if not isinstance(native.as_pytorch(error), torch.OutOfMemoryError):
                raise
            warn_once(f"too little memory to measure plans for [{key.text}]: the rule decides")
            return
    _caches[key.device].add(key, times)


def _functions(backend: str, names: Sequence[str], benchmark: bool) -> Plans:
    """Return the functions behind the names of a call's plans, in the order of DIRECTIONS."""
    forward, input_gradient, weight_gradient = names
    plans = (tuned if benchmark else registry)[backend]
    return Plans(
        plans[forward].forward,
        namespaces[backend],
        input_gradient=None if input_gradient == PASSES else plans[input_gradient].input_gradient,
        weight_gradient=None
        if weight_gradient == PASSES
        else plans[weight_gradient].weight_gradient,
    )


def _plain(t: Tensor) -> bool:
    return type(t) is Tensor or type(t) is Parameter


def _dimensions(t: Tensor | None) -> int | None:
    return None if t is None else t.dim()


def choose(
    backend: str, operands: Operands, problem: Problem, kept: str, backward: int, benchmark: bool
) -> Plans:
    """Return the plans of a call.

    Args:
        backend: one of ``key.BACKENDS``.
        operands, problem: the call.
        kept: what its backward keeps.
        backward: bits NEEDS_X and NEEDS_WEIGHT of ``records``: the gradients that may come.
        benchmark: whether to measure what is not known, and to tune what runs.
    """
    x, weight, bias, radius, norm_mean, k = operands
    device = x.device
    benchmark = benchmark and _measures(device.type)
    # Read once: other threads may change it meanwhile.
    setting = _setting()
    if torch.compiler.is_compiling():
        wanted = _wanted(backward)
        names = [
            _decided_name(
                tuple(key_of(backend, operands, problem, kept, direction)),
                _willing(backend, operands, problem, direction, setting),
                benchmark,
            )
            if direction in wanted
            else PASSES
            for direction in DIRECTIONS
        ]
        return _functions(backend, names, benchmark)
    if not (_plain(x) and _plain(weight)):
        return _choose(backend, operands, problem, kept, backward, benchmark, setting)[0]
    facts = (
        backend,
        x.shape,
        x.stride(),
        x.dtype,
        device,
        weight.shape,
        weight.stride(),
        bias is None,
        _dimensions(radius),
        _dimensions(norm_mean),
        _dimensions(k),
        problem,
        kept,
        backward,
        benchmark,
        setting,
    )
    choices = _choices
    found = choices.get(facts)
    if found is None:
        found, final = _choose(backend, operands, problem, kept, backward, benchmark, setting)
        if final:
            if len(choices) >= _MOST_CHOICES:
                choices.clear()
            choices[facts] = found
    return found


def _wanted(backward: int) -> tuple[str, ...]:
    wanted: tuple[str, ...] = (FORWARD,)
    if backward & records.NEEDS_X:
        wanted = (*wanted, INPUT_GRADIENT)
    if backward & records.NEEDS_WEIGHT:
        wanted = (*wanted, WEIGHT_GRADIENT)
    return wanted


def _choose(
    backend: str,
    operands: Operands,
    problem: Problem,
    kept: str,
    backward: int,
    benchmark: bool,
    setting: Allowed,
) -> tuple[Plans, bool]:
    """Return the plans of a call, and whether the choice stands, so that it is not made again.

    It does not where the plans should have been measured but cannot be now.
    """
    names, final = [], True
    for direction in DIRECTIONS:
        name = PASSES
        if direction in _wanted(backward):
            willing = _willing(backend, operands, problem, direction, setting)
            key = key_of(backend, operands, problem, kept, direction)
            with _lock:
                if benchmark and _lacks_times(key, willing):
                    if _may_measure(operands.x):
                        _measure(operands, problem, kept, key, willing)
                    else:
                        final = False
                name = decide(key, willing, benchmark).plan
        names.append(name)
    return _functions(backend, names, benchmark), final


def _lacks_times(key: Key, willing: Sequence[str]) -> bool:
    """Whether there is something to measure."""
    if _pinned is not None or len(willing) == 1 or None in key.sizes:
        return False
    source, times = _known(key, benchmark=True)
    if source == MEASURED:
        return any(name not in times for name in willing)
    return _caches[key.device].table.count(key) < MOST_SIZES


def describe(
    backend: str, operands: Operands, problem: Problem, kept: str, benchmark: bool
) -> list[str]:
    """Return lines for the report: by direction the choice, and each plan's time or refusal."""
    benchmark = benchmark and _measures(operands.x.device.type)
    setting = _setting()
    plans = registry[backend]
    lines = []
    for direction in DIRECTIONS:
        title = direction.replace("_", " ")
        reasons = _reasons(backend, operands, problem, direction, setting)
        willing = tuple(name for name, reason in reasons.items() if reason is None)
        if willing:
            key = key_of(backend, operands, problem, kept, direction)
            with _lock:
                decision = decide(key, willing, benchmark)
            chosen, times = decision.plan, decision.times
            lines.append(f"{title}: plan {chosen} ({plans[chosen].title}; {decision.source})")
        else:
            chosen, times = None, {}
            lines.append(f"{title}: no allowed plan runs it")
        for name in plans:
            if name in reasons:
                reason = reasons[name] or (
                    f"{times[name]:.3f} ms" if name in times else "not measured"
                )
            else:
                reason = "not allowed (backends.plans, DCCONV_PLANS)"
            lines.append(f"  {name}  {reason}")
    return lines


def forget() -> None:
    """Drop what this process knows; tables are read again when they are needed."""
    global _choices
    with _lock:
        _caches.clear()
        _shipped.clear()
        _choices = {}
