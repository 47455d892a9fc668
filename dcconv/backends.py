"""Which implementation runs a call, and why the others do not.

The backends are those of the one list (``dcconv.call.implementations``), in its order; each has one
predicate that returns None or one sentence. The same sentence is the exception for a forced
backend, the skip reason of a test and the line of ``report``. Choosing has no side effects but one
warning per process and reason.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dcconv import native, settings
from dcconv.call import implementations, strategy
from dcconv.call.key import FORWARD
from dcconv.call.refusals import Call, describe, is_transformed
from dcconv.call.runner import Runner, runner
from dcconv.call.saved import NOTHING, kept
from dcconv.call.strategy import pin_table, plans, strategies
from dcconv.operator import arguments, checks
from dcconv.operator.records import CURVATURE, RADIUS, Geometry, Operator
from dcconv.tracing import recording
from dcconv.warn import warn_once

__all__ = [
    "AUTO",
    "Call",
    "benchmark",
    "benchmarking",
    "check_name",
    "choose",
    "describe",
    "is_transformed",
    "names",
    "pin_table",
    "plans",
    "report",
    "strategies",
    "use_backend",
    "why_not",
]

AUTO = "auto"

#: Whether calls on the cuda and triton backends measure the strategies that can run them, once per
#: GPU and kind of call, and take the fastest: ``torch.backends.cudnn.benchmark`` for the whole
#: operator. Triton's one pass is measured, and run, with tiles that its autotuner chooses. What was
#: measured is kept on disk, in ``$DCCONV_CACHE`` or ``dcconv`` in the user's cache folder. Nothing
#: is measured while a CUDA graph is captured or a call is traced; in Triton's interpreter, under
#: ``torch.use_deterministic_algorithms`` and with a pinned table the mode is off. This is the
#: process's setting; ``benchmarking`` changes that of a thread.
benchmark: bool = False


def _benchmarks() -> bool:
    own = settings.benchmark.own()
    return benchmark if own is None else own


_BACKENDS = tuple(runner(backend, _benchmarks) for backend in implementations.backends.values())

#: Names of all backends, in order of preference.
names: tuple[str, ...] = tuple(implementations.backends)


def _of_environment() -> str:
    # An empty variable counts as none.
    return os.environ.get("DCCONV_BACKEND") or AUTO


# The process's setting.
_default = _of_environment()


def setting() -> str:
    """Return the backend's name, or ``auto``, that holds for a call which names none."""
    return settings.backend.own() or _default


def check_name(argument: str, name: object) -> None:
    """Require ``auto`` or the name of a backend."""
    checks.choice(argument, name, (AUTO, *names))


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend for every call inside the context that names none itself.

    The setting belongs to the thread or asyncio task that enters the context; threads started
    inside begin with the process's setting, which ``DCCONV_BACKEND`` sets at import. Backward
    passes called inside follow it, also where autograd runs them in threads of its own, and so does
    what is traced inside. Compiled code is compiled anew for another setting of its thread.

    Args:
        name: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: by a call inside, with the backend's own sentence, if it refuses.

    Example:
        >>> import dcconv, torch
        >>> with dcconv.use_backend("reference"):
        ...     y = dcconv.DecoupledConv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8))
    """
    check_name("backend", name)
    return settings.backend.within(name)


def benchmarking(enabled: bool = True) -> AbstractContextManager[None]:
    """Have another value than ``backends.benchmark`` inside the context, as ``use_backend`` has.

    Args:
        enabled: whether calls inside measure strategies and take the fastest.

    Raises:
        TypeError: enabled is no boolean.

    Example:
        >>> import dcconv
        >>> with dcconv.backends.benchmarking():
        ...     pass
    """
    checks.boolean("enabled", enabled)
    return settings.benchmark.within(enabled)


def why_not(
    name: str,
    x: Tensor,
    magnitude: str = Operator.magnitude,
    angular: str = Operator.angular,
    weighting: str = Operator.weighting,
) -> str | None:
    """Return None if a backend can run calls on a tensor like x, else one sentence why not.

    Args:
        name: ``cuda``, ``triton``, ``cpu`` or ``reference``.
        x: an input tensor; its device and dtype count.
        magnitude, angular, weighting: the operator, as in
            :func:`dcconv.functional.decoupled_conv2d`; a function that was registered in Python
            alone runs on the reference only.

    Raises:
        ValueError: the name of the backend or of a function is unknown.

    Example:
        >>> import dcconv, torch
        >>> dcconv.backends.why_not("cuda", torch.zeros(1))
        'it runs on CUDA tensors, got a cpu tensor'
    """
    checks.choice("name", name, names)
    operator = Operator(magnitude, angular, weighting)
    return _BACKENDS[names.index(name)].why_not(describe(x, operator))


def choose(x: Tensor, requested: str | None = None, operator: Operator | None = None) -> Runner:
    """Return the backend for a call: the requested one, or the first willing one.

    Args:
        x: the input tensor.
        requested: a backend's name, ``auto``, or None for the process's setting.
        operator: the call's; None for a patch norm, which has no functions to be asked about.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named backend refuses; the message is its sentence.
    """
    call = describe(x, operator)
    own = settings.backend.own() if requested is None else requested
    name = _default if own is None else own
    if name != AUTO:
        check_name("DCCONV_BACKEND" if own is None else "backend", name)
        backend = _BACKENDS[names.index(name)]
        reason = backend.why_not(call)
        if reason is not None:
            raise NotImplementedError(f"dcconv: backend '{name}' cannot run this call: {reason}")
        return backend
    if recording():
        # The same operations with gradients and without: the tracer compares the two.
        warn_once(
            "torch.jit.trace records plain PyTorch operations; a backend that is named records its "
            "op, under torch.no_grad()"
        )
        return _BACKENDS[-1]
    for backend in _meant(call):
        if backend.why_not(call) is None:
            return backend
    if not call.transformed:
        _warn_slow(call)
    return _BACKENDS[-1]


def _meant(call: Call) -> list[Runner]:
    """Return the backends that are meant for a call's device."""
    return [backend for backend in _BACKENDS if call.device in backend.backend.devices]


def _warn_slow(call: Call) -> None:
    if torch.compiler.is_compiling():
        return
    said = "; ".join([f"{backend.name}: {backend.why_not(call)}" for backend in _meant(call)])
    if said:
        warn_once(f"the plain PyTorch reference runs on {call.device} tensors ({said})")


def report(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
    keep: str = "auto",
    **options: Any,
) -> str:
    """Return which backend would run a call, one line per backend, and what backward would keep.

    Under a backend that has several strategies stand those of each direction: the choice, how it
    was made, and every strategy's time, where it was measured, or refusal. Nothing is measured for
    the report.

    Args:
        x, weight, bias, stride, padding, dilation, groups, options: as in
            :func:`dcconv.functional.decoupled_conv2d`.

    Raises:
        ValueError, TypeError, NotImplementedError: as the call itself.

    Example:
        >>> import dcconv, torch
        >>> text = dcconv.backends.report(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))
        >>> "reference" in text
        True
    """
    radius, k = options.pop("radius", RADIUS), options.pop("k", CURVATURE)
    mean, mode = options.pop("norm_mean", None), options.pop("padding_mode", "zeros")
    operator, geometry = Operator(**options), Geometry(stride, padding, dilation, groups, mode)
    operands, problem = arguments.convolution(x, weight, bias, radius, mean, k, operator, geometry)
    checks.choice("keep", keep, checks.KEEPS)
    chosen = choose(operands.x, backend, operator)
    call = describe(operands.x, operator)
    mode = kept(problem, operands.x.dtype, operands.bias is not None, keep)
    lines = [
        f"{operator.magnitude} x {operator.angular}, weighting {operator.weighting}, "
        f"norm {problem.norm}; x {list(x.shape)} {x.dtype} {x.device}; "
        f"weight {list(weight.shape)}"
    ]
    for candidate in _BACKENDS:
        reason = candidate.why_not(call)
        state = "runs this call" if candidate.name == chosen.name else reason or "could run it"
        if candidate.name == "cpu" and reason is None:
            state += f" ({native.cpu_instructions()})"
        lines.append(f"  {candidate.name:<10}{state}")
        if len(implementations.rows[candidate.name, FORWARD]) > 1 and reason is None:
            said = strategy.describe(candidate.name, operands, problem, mode, _benchmarks())
            lines += [f"    {line}" for line in said]
    if chosen is not _BACKENDS[-1]:
        kept_names = (
            "x and weight" if mode == NOTHING else f"x, weight, the norm map and the {mode}"
        )
        lines.append(f"  backward keeps {kept_names}")
    return "\n".join(lines)
