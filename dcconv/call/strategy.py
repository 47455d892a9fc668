"""The choice itself: which strategies are willing, what is known about their times, what runs.

A call's choice is made once per key and setting, and then found in a dictionary. What is known
comes from a pinned table, else from this user's measurements in benchmark mode, else from the
tables that ship with the package; where nothing is known, the rule decides. The ops of the cpu
backend choose themselves; there a setting forces them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dcconv import native, settings
from dcconv.call import cpu, implementations
from dcconv.call.autograd import Chosen
from dcconv.call.key import DIRECTIONS, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Key, key_of
from dcconv.call.measure.stopwatch import Stopwatch, compare, cuda_events
from dcconv.call.measure.tables import Cache, Table, Times, read, shipped
from dcconv.call.rule import FUSED, GRAPH, LIBRARY, STRATEGIES, fastest, rule
from dcconv.call.saved import DOT, NOTHING
from dcconv.operator.checks import value_error
from dcconv.operator.layout import PLAIN, memory_format, on_device
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import library, records
from dcconv.passes.backward import InputSide
from dcconv.passes.records import Taps
from dcconv.tracing import constant_for_tracing
from dcconv.warn import warn_once


class Allowed(NamedTuple):
    """Which strategies calls may take: names joined by commas, of both gradients unless named."""

    names: str = ",".join(STRATEGIES)
    input_gradient: str | None = None
    weight_gradient: str | None = None


class Question(NamedTuple):
    """One call to choose for.

    Attributes:
        backend: its name.
        operands, problem: the call.
        kept: what its backward keeps.
        benchmark: whether to measure what is not known, and to tune what runs.
        setting: what is allowed, read once: other threads may change it meanwhile.
    """

    backend: str
    operands: Operands
    problem: Problem
    kept: str
    benchmark: bool
    setting: Allowed

    def key(self, direction: str) -> Key:
        """Return the key of a direction."""
        return key_of(self.backend, self.operands, self.problem, self.kept, direction)


class Decision(NamedTuple):
    """A chosen strategy, and how it was chosen."""

    strategy: str
    source: str
    times: Times


MEASURED, BY_RULE, ONLY_ONE = "measured here", "by rule", "the only one willing"

# What a strategy is, for the report.
TITLES = {
    LIBRARY: "library convolution and fused passes",
    FUSED: "one pass",
    GRAPH: "cuDNN graph",
}

# The names that strategies had, accepted in this release.
OLD_NAMES = {"A": LIBRARY, "B": FUSED, "G": GRAPH}
NEW_NAMES = ", ".join(f"{new} ({old})" for old, new in OLD_NAMES.items())

VARIABLE, OLD_VARIABLE = "DCCONV_STRATEGIES", "DCCONV_PLANS"

EVERY = Allowed()

CPU = implementations.CPU.name


def _of_environment() -> tuple[str, Allowed]:
    """Return the variable that says what the process allows, and that; empty ones count as none."""
    for variable in (VARIABLE, OLD_VARIABLE):
        names = os.environ.get(variable)
        if names:
            return variable, Allowed(names)
    return VARIABLE, EVERY


# The process's setting, and where it comes from.
_variable, _allowed = _of_environment()

#: What times the strategies: ``Callable[[run], milliseconds per call]``.
stopwatch: Stopwatch = cuda_events

#: Where strategies are timed. Kernels on CPU tensors are interpreted: their times say nothing of a
#: GPU.
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
_choices: dict[tuple[Any, ...], Chosen] = {}


def checked_names(argument: str, names: object, silent: bool = False) -> tuple[str, ...]:
    """Return the strategies in a text such as ``library,fused``; ValueError if it is none.

    Old names are translated, with one warning unless ``silent``.
    """
    given = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else ()
    found = tuple(OLD_NAMES.get(name, name) for name in given)
    if not found or any(name not in STRATEGIES for name in found):
        raise value_error(
            argument, f"be names out of {', '.join(STRATEGIES)}, joined by commas", repr(names)
        )
    if found != given and not silent and not torch.compiler.is_compiling():
        warn_once(f"the strategies are named {NEW_NAMES}; a later release drops the letters")
    return found


def strategies(
    names: str, *, input_gradient: str | None = None, weight_gradient: str | None = None
) -> AbstractContextManager[None]:
    """Let the calls inside the context choose between some strategies only, on every backend.

    The setting belongs to the thread or asyncio task that enters the context, as that of
    ``dcconv.use_backend``; ``DCCONV_STRATEGIES`` sets the process's at import. It binds the cuda,
    triton and cpu backends; on cpu, compiled code leaves the choice to the op. The reference has
    nothing to choose between.

    Args:
        names: names joined by commas: ``library`` (library convolution and fused passes), ``fused``
            (one pass), ``graph`` (cuDNN graph, cuda backend alone). A gradient that none of them
            computes is left to library.
        input_gradient, weight_gradient: the strategies of this direction, where they differ; then
            without library as a way out.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: by a call inside, with the strategies' own sentences, if all refuse.

    Example:
        >>> import dcconv
        >>> with dcconv.backends.strategies("library"):
        ...     pass
    """
    return _allow(names, input_gradient, weight_gradient, False)


def plans(
    names: str, *, input_gradient: str | None = None, weight_gradient: str | None = None
) -> AbstractContextManager[None]:
    """Allow strategies as :func:`strategies` does, which a later release has alone."""
    if not torch.compiler.is_compiling():
        warn_once(f"backends.plans is named backends.strategies, and its plans {NEW_NAMES}")
    return _allow(names, input_gradient, weight_gradient, True)


def _allow(
    names: str, input_gradient: str | None, weight_gradient: str | None, silent: bool
) -> AbstractContextManager[None]:
    def checked(argument: str, value: str | None) -> str | None:
        return None if value is None else ",".join(checked_names(argument, value, silent))

    said = ",".join(checked_names("names", names, silent))
    own = (checked("input_gradient", input_gradient), checked("weight_gradient", weight_gradient))
    return settings.strategies.within(Allowed(said, *own))


def is_bound() -> bool:
    """Whether a setting, of a context or of the process, allows some strategies only."""
    return _allowed is not EVERY or settings.strategies.own() is not None


def _setting() -> Allowed:
    return settings.strategies.own() or _allowed


def pin_table(path: str | os.PathLike[str] | None) -> None:
    """Choose by one file of measured times and nothing else; nothing is measured or tuned then.

    A call without an entry follows the rule. With a pinned table the same calls take the same
    strategies in every process, so it counts under ``torch.use_deterministic_algorithms`` as well.
    Compiled and exported code keeps the strategies that it was traced with.

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


def _allowed_names(direction: str, setting: Allowed) -> tuple[str, ...]:
    """Return the strategies that a setting allows in a direction."""
    names = getattr(setting, direction, None)
    if names is not None:
        return checked_names(VARIABLE, names)
    if setting is _allowed and _variable == OLD_VARIABLE and not torch.compiler.is_compiling():
        warn_once(f"{OLD_VARIABLE} is named {VARIABLE}, and its plans {NEW_NAMES}")
    found = checked_names(_variable, setting.names, _variable == OLD_VARIABLE)
    return found if direction == FORWARD else (LIBRARY, *found)


def _reasons(question: Question, direction: str) -> dict[str, str | None]:
    """Return by allowed strategy why it refuses a direction of a call, None if it does not."""
    backend, operands, problem, *_ = question
    allowed = _allowed_names(direction, question.setting)
    rows = implementations.rows[backend, direction]
    return {
        name: rows[name].why_not(operands, problem)
        if name in rows
        else f"the {backend} backend has no strategy {name}"
        for name in STRATEGIES
        if name in allowed
    }


def _willing(question: Question, direction: str) -> tuple[str, ...]:
    reasons = _reasons(question, direction)
    willing = tuple([name for name, reason in reasons.items() if reason is None])
    if not willing:
        said = "; ".join([f"{name}: {reason}" for name, reason in reasons.items()])
        raise NotImplementedError(
            f"dcconv: no allowed strategy runs the {direction} of this call: {said}"
        )
    return willing


def by_rule(key: Key, willing: Sequence[str]) -> str:
    """Return the willing strategy that should be fastest, as a key's backend reasons."""
    order = implementations.backends[key.backend].order
    assert order is not None
    return rule(order(key), willing)


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
        return Decision(willing[0], ONLY_ONE, times)
    name = fastest(times, willing)
    if name is None:
        return Decision(by_rule(key, willing), BY_RULE, {})
    return Decision(name, source, times)


# Constant for tracing, which cannot see what is pinned.
@constant_for_tracing
def _measures(device_type: str) -> bool:
    """Whether benchmark mode counts: measured choices and tiles may differ from run to run."""
    return (
        device_type in TIMED_DEVICES
        and _pinned is None
        and not torch.are_deterministic_algorithms_enabled()
    )


# Constant for tracing: tables are not part of a graph.
@constant_for_tracing
def _decided_name(key: tuple[Any, ...], willing: tuple[str, ...], benchmark: bool) -> str:
    # A plain tuple: tracing does not make constants of named ones.
    with _lock:
        return decide(Key(*key), willing, benchmark).strategy


def _scratch(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    # Tensors with gaps or repeats may lose their layout where strides are only preserved.
    layout = memory_format(t) if t.dim() == 4 else torch.preserve_format
    return t.detach().clone(memory_format=layout)


def _runs(question: Question, direction: str, willing: Sequence[str]) -> dict[str, Any]:
    """Return by strategy a function that runs a direction, on copies of the call's tensors."""
    backend, operands, problem, kept, *_ = question
    rows = implementations.rows[backend, direction]
    runs = {name: rows[name].run_as(True) for name in willing}
    operands = Operands._make(_scratch(t) for t in operands)
    arguments: tuple[Any, ...] = (operands, problem, kept)
    if direction != FORWARD:
        layout = memory_format(operands.x, operands.weight)
        x = operands.x.contiguous(memory_format=layout)
        weight = operands.weight.contiguous(memory_format=memory_format(operands.weight))
        # Of the right shapes, layouts and magnitudes.
        namespace = implementations.backends[backend].namespace
        assert namespace is not None
        _, norm_map, _, grad_u, _ = library.forward(operands, problem, DOT, namespace=namespace)
        barrier = problem.norm == NORM_BATCH and problem.norm_grad
        sigma = norm_map.new_ones(()) if barrier else None
        side = InputSide(grad_u, x, weight, Taps(norm_map, norm_map, sigma))
        gradient_of_x = direction == INPUT_GRADIENT
        arguments = (side, problem) if gradient_of_x else (*side[:3], problem)
    return {name: partial(run, *arguments) for name, run in runs.items()}


def _may_measure(x: Tensor) -> bool:
    # A mode that watches every op would see those of the measurement; some are tracers.
    if _get_current_dispatch_mode() is not None:
        return False
    with on_device(x):
        return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _measure(question: Question, key: Key, willing: Sequence[str]) -> None:
    """Time the willing strategies of one direction and remember it; the lock is held."""
    with (
        on_device(question.operands.x),
        torch.no_grad(),
        torch.profiler.record_function("dcconv: measuring strategies"),
    ):
        try:
            times = compare(_runs(question, key.direction, willing), stopwatch)
        except RuntimeError as error:
            if not isinstance(native.as_pytorch(error), torch.OutOfMemoryError):
                raise
            warn_once(f"too little memory to measure strategies for [{key.text}]: the rule decides")
            return
    _caches[key.device].add(key, times)


def _functions(backend: str, names: Sequence[str], benchmark: bool) -> Chosen:
    """Return the functions behind the names of a call's strategies, in the order of DIRECTIONS."""
    forward, input_gradient, weight_gradient = [
        implementations.rows[backend, direction][name].run_as(benchmark)
        if direction == FORWARD or name != LIBRARY
        else None
        for direction, name in zip(DIRECTIONS, names, strict=True)
    ]
    namespace = implementations.backends[backend].namespace
    assert forward is not None and namespace is not None
    return Chosen(forward, namespace, input_gradient, weight_gradient)


def choose(
    backend: str, operands: Operands, problem: Problem, kept: str, backward: int, benchmark: bool
) -> Chosen:
    """Return what computes a call on a backend whose strategies are composed of passes.

    Args:
        backend: its name.
        operands, problem: the call.
        kept: what its backward keeps.
        backward: bits NEEDS_X and NEEDS_WEIGHT of ``records``: the gradients that may come.
        benchmark: whether to measure what is not known, and to tune what runs.
    """
    x, weight, bias, radius, norm_mean, k = operands
    benchmark = benchmark and _measures(x.device.type)
    question = Question(backend, operands, problem, kept, benchmark, _setting())
    if torch.compiler.is_compiling() or not (type(x) in PLAIN and type(weight) in PLAIN):
        return _choose(question, backward)[0]
    images = (x.shape, x.stride(), x.dtype, x.device)
    filters = (weight.shape, weight.stride(), bias is None)
    numbers = tuple([None if t is None else t.dim() for t in (radius, norm_mean, k)])
    said = (problem, kept, backward, benchmark, question.setting)
    facts = (backend, *images, *filters, *numbers, *said)
    choices = _choices
    found = choices.get(facts)
    if found is None:
        found, final = _choose(question, backward)
        if final:
            if len(choices) >= _MOST_CHOICES:
                choices.clear()
            choices[facts] = found
    return found


def _wanted(backward: int) -> tuple[str, ...]:
    bits = ((INPUT_GRADIENT, records.NEEDS_X), (WEIGHT_GRADIENT, records.NEEDS_WEIGHT))
    return FORWARD, *[direction for direction, bit in bits if backward & bit]


def _choose(question: Question, backward: int) -> tuple[Chosen, bool]:
    """Return what computes a call, and whether the choice stands, so that it is not made again.

    It does not where the strategies should have been measured but cannot be now.
    """
    benchmark, names, final = question.benchmark, [], True
    for direction in DIRECTIONS:
        name = LIBRARY
        if direction in _wanted(backward):
            willing, key = _willing(question, direction), question.key(direction)
            if torch.compiler.is_compiling():
                name = _decided_name(tuple(key), willing, benchmark)
            else:
                with _lock:
                    if benchmark and _lacks_times(key, willing):
                        if _may_measure(question.operands.x):
                            _measure(question, key, willing)
                        else:
                            final = False
                    name = decide(key, willing, benchmark).strategy
        names.append(name)
    return _functions(question.backend, names, benchmark), final


def _lacks_times(key: Key, willing: Sequence[str]) -> bool:
    """Whether there is something to measure."""
    if _pinned is not None or len(willing) == 1 or None in key.sizes:
        return False
    source, times = _known(key, benchmark=True)
    if source == MEASURED:
        return any(name not in times for name in willing)
    return _caches[key.device].table.count(key) < MOST_SIZES


def force(operands: Operands, problem: Problem, backward: int | None) -> Chosen | None:
    """Return what a setting makes of a call of the cpu backend; None where its ops choose.

    Args:
        operands, problem: the call.
        backward: as in :func:`choose`; None where no gradient may come.

    Raises:
        NotImplementedError: no allowed strategy computes the call.
    """
    if not (type(operands.x) in PLAIN and type(operands.weight) in PLAIN):
        return None
    question = Question(CPU, operands, problem, NOTHING, False, _setting())
    forward = _forced_name(_willing(question, FORWARD))
    gradient = cpu.AUTO
    if backward is not None:
        # Also where neither of the two is wanted: the op is the same.
        directions = _wanted(backward)[1:] or DIRECTIONS[1:]
        willing = [_willing(question, name) for name in directions]
        both = [name for name in willing[0] if name in willing[-1]]
        if not both:
            raise NotImplementedError(
                "dcconv: no allowed strategy runs the backward of this call: the cpu backend has "
                f"one for both gradients, got {willing[0][0]} for the input_gradient and "
                f"{willing[-1][0]} for the weight_gradient"
            )
        gradient = _forced_name(both)
    if forward == gradient == cpu.AUTO:
        return None
    return Chosen(cpu.forward(forward), backward=cpu.backward(gradient))


def _forced_name(willing: Sequence[str]) -> str:
    return willing[0] if len(willing) == 1 else cpu.AUTO


def _decided(question: Question, direction: str, willing: Sequence[str]) -> Decision:
    """Return the choice of one direction for the report, without measuring."""
    if implementations.backends[question.backend].order is not None:
        with _lock:
            return decide(question.key(direction), willing, question.benchmark)
    if len(willing) == 1:
        return Decision(willing[0], ONLY_ONE, {})
    return Decision(cpu.taken(question.operands, question.problem, direction), BY_RULE, {})


def describe(
    backend: str, operands: Operands, problem: Problem, kept: str, benchmark: bool
) -> list[str]:
    """Return lines for the report: by direction the choice, and each strategy's time or refusal."""
    benchmark = benchmark and _measures(operands.x.device.type)
    question = Question(backend, operands, problem, kept, benchmark, _setting())
    lines = []
    for direction in DIRECTIONS:
        title = direction.replace("_", " ")
        reasons = _reasons(question, direction)
        willing = tuple(name for name, reason in reasons.items() if reason is None)
        times: Times = {}
        if willing:
            name, source, times = _decided(question, direction, willing)
            lines.append(f"{title}: {name} ({TITLES[name]}; {source})")
        else:
            lines.append(f"{title}: no allowed strategy runs it")
        for name in implementations.rows[backend, direction]:
            if name in reasons:
                reason = reasons[name] or (
                    f"{times[name]:.3f} ms" if name in times else "not measured"
                )
            else:
                reason = f"not allowed (backends.strategies, {VARIABLE})"
            lines.append(f"  {name:<9}{reason}")
    return lines


def forget() -> None:
    """Drop what this process knows; tables are read again when they are needed."""
    global _choices
    with _lock:
        _caches.clear()
        _shipped.clear()
        _choices = {}
