"""Which implementation runs a call, and why the others do not.

One record per backend, in order of preference; each has one predicate that returns None or one
sentence. The same sentence is the exception for a forced backend, the skip reason of a test and
the line of ``report``. Choosing has no side effects but one warning per process and reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

import dcconv.passes.fakes  # noqa: F401  (registers them)
from dcconv import native, settings
from dcconv.call import autograd, key, strategy
from dcconv.call.autograd import ONE_OP, PLAN_A, TRITON
from dcconv.call.saved import NOTHING, kept
from dcconv.call.strategy import allowed as plans
from dcconv.call.strategy import pin_table
from dcconv.operator import arguments, checks, reference
from dcconv.operator.records import CURVATURE, RADIUS, Geometry, Operands, Operator, Problem
from dcconv.passes import records
from dcconv.tracing import recording
from dcconv.triton import environment
from dcconv.warn import warn_once

__all__ = [
    "AUTO",
    "Backend",
    "Call",
    "benchmark",
    "benchmarking",
    "check_name",
    "choose",
    "describe",
    "names",
    "pin_table",
    "plans",
    "report",
    "use_backend",
    "why_not",
]

AUTO = "auto"

#: Whether calls on the cuda and triton backends measure the plans that can run them, once per GPU
#: and kind of call, and take the fastest: ``torch.backends.cudnn.benchmark`` for the whole
#: operator. Triton's one pass is measured, and run, with tiles that its autotuner chooses. What was
#: measured is kept on disk, in ``$DCCONV_CACHE`` or ``dcconv`` in the user's cache folder. Nothing
#: is measured while a CUDA graph is captured or a call is traced; in Triton's interpreter, under
#: ``torch.use_deterministic_algorithms`` and with a pinned table the mode is off. This is the
#: process's setting; ``benchmarking`` changes that of a thread.
benchmark: bool = False


def _benchmarks() -> bool:
    own = settings.benchmark.own()
    return benchmark if own is None else own


class Call(NamedTuple):
    """What a backend is asked about: static facts only, so that choosing can be traced.

    Attributes:
        device, dtype: of x.
        transformed: whether a torch.func transform or a forward-mode derivative is active.
        gpu: index of x's GPU.
        functions: magnitude, angular function and weighting; None for a patch norm, or where the
            question is about plain tensors.
        recorded: whether torch.jit.trace records the call, with gradients on.
    """

    device: str
    dtype: torch.dtype
    transformed: bool
    gpu: int = 0
    functions: tuple[str, str, str] | None = None
    recorded: bool = False


class Backend(NamedTuple):
    """One implementation: its predicate, its convolution and its patch norm."""

    name: str
    why_not: Callable[[Call], str | None]
    conv2d: Callable[[Operands, Problem, str], tuple[Tensor, Tensor | None]]
    patch_norm: Callable[[Tensor, tuple[int, int], Problem], Tensor]


def _why_not_transformed(call: Call) -> str | None:
    if call.transformed:
        return "torch.func transforms and forward-mode derivatives need plain PyTorch operations"
    if call.recorded:
        return (
            "torch.jit.trace records its op under torch.no_grad() alone, since recorded ops have "
            "no gradient"
        )
    return None


def _why_not_functions(call: Call) -> str | None:
    if call.functions is None:
        return None
    return native.why_not_functions(call.functions[0], call.functions[1])


_gpus: dict[int, str | None] = {}


# Constant for tracing, and asked once per GPU.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_gpu(index: int) -> str | None:
    if index not in _gpus:
        if index < torch.cuda.device_count():
            _gpus[index] = native.why_not_gpu(torch.cuda.get_device_capability(index))
        else:
            _gpus[index] = f"this machine has no GPU {index}"
    return _gpus[index]


def _why_not_cuda(call: Call) -> str | None:
    if call.device != "cuda":
        return f"it runs on CUDA tensors, got a {call.device} tensor"
    reason = native.cuda_missing()
    if reason is not None:
        return reason
    return _why_not_gpu(call.gpu) or _why_not_functions(call) or _why_not_transformed(call)


_kernels: dict[int, str | None] = {}


# Constant for tracing, and asked once per GPU: it imports the kernels.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_kernels(index: int) -> str | None:
    if index not in _kernels:
        _kernels[index] = environment.why_not(index)
    return _kernels[index]


# Constant for tracing: it reads a module's lists.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_twins(magnitude: str, angular: str, weighting: str) -> str | None:
    return environment.twinless(magnitude, angular, weighting)


def _why_not_triton(call: Call) -> str | None:
    device = "cpu" if environment.INTERPRETED else "cuda"
    if call.device != device:
        suffix = " in Triton's interpreter" if environment.INTERPRETED else ""
        return f"it runs on {device.upper()} tensors{suffix}, got a {call.device} tensor"
    if call.dtype == torch.float64:
        return "its functions are float32 polynomials, got a float64 tensor"
    reason: str | None = _why_not_kernels(call.gpu)
    if reason is None and call.functions is not None:
        reason = _why_not_twins(*call.functions)
    return reason or _why_not_transformed(call)


def _why_not_cpu(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it runs on CPU tensors, got a {call.device} tensor"
    if native.missing is not None:
        return native.missing
    return _why_not_functions(call) or _why_not_transformed(call)


def _why_not_reference(call: Call) -> str | None:
    return None


def _differentiated(operands: Operands) -> bool:
    if not torch.is_grad_enabled():
        return False
    # One after another: a generator takes as long as the rest of such a call.
    x, weight, bias, radius, norm_mean, k = operands
    return (
        weight.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (radius is not None and radius.requires_grad)
        or (norm_mean is not None and norm_mean.requires_grad)
        or (k is not None and k.requires_grad)
    )


def _one_op_conv2d(operands: Operands, problem: Problem, mode: str) -> tuple[Tensor, Tensor | None]:
    if _differentiated(operands):
        results = autograd.DecoupledConv2dFunction.apply(*operands, problem, mode, None)
    else:
        results = autograd.conv2d_forward(operands, problem, NOTHING, None)
    return results[0], results[2]


def _planned_conv2d_by(
    backend: str,
) -> Callable[[Operands, Problem, str], tuple[Tensor, Tensor | None]]:
    def conv2d(operands: Operands, problem: Problem, mode: str) -> tuple[Tensor, Tensor | None]:
        if not _differentiated(operands):
            chosen = strategy.choose(backend, operands, problem, NOTHING, 0, _benchmarks())
            results = autograd.conv2d_forward(operands, problem, NOTHING, chosen)
            return results[0], results[2]
        backward = records.NEEDS_X if operands.x.requires_grad else 0
        if operands.weight.requires_grad:
            backward |= records.NEEDS_WEIGHT
        chosen = strategy.choose(backend, operands, problem, mode, backward, _benchmarks())
        results = autograd.DecoupledConv2dFunction.apply(*operands, problem, mode, chosen)
        return results[0], results[2]

    return conv2d


def _patch_norm_by(plan: str) -> Callable[[Tensor, tuple[int, int], Problem], Tensor]:
    def patch_norm(x: Tensor, kernel: tuple[int, int], problem: Problem) -> Tensor:
        b: Tensor = autograd.PatchNormFunction.apply(x, kernel, problem, plan)
        return b

    return patch_norm


def _reference_conv2d(
    operands: Operands, problem: Problem, mode: str
) -> tuple[Tensor, Tensor | None]:
    return reference.forward(operands, problem)


_BACKENDS = (
    Backend("cuda", _why_not_cuda, _planned_conv2d_by("cuda"), _patch_norm_by(PLAN_A)),
    Backend("triton", _why_not_triton, _planned_conv2d_by("triton"), _patch_norm_by(TRITON)),
    Backend("cpu", _why_not_cpu, _one_op_conv2d, _patch_norm_by(ONE_OP)),
    Backend("reference", _why_not_reference, _reference_conv2d, reference.window_norm),
)

#: Names of all backends, in order of preference.
names: tuple[str, ...] = tuple(backend.name for backend in _BACKENDS)

# The backends meant for a device; taking "reference" there instead is worth a warning. Others that
# are willing, such as interpreted kernels, run where they are named.
_FAST = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def _of_environment() -> str:
    # An empty variable counts as none.
    return os.environ.get("DCCONV_BACKEND") or AUTO


# The process's setting.
_default = _of_environment()


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
        enabled: whether calls inside measure plans and take the fastest.

    Raises:
        TypeError: enabled is no boolean.

    Example:
        >>> import dcconv
        >>> with dcconv.backends.benchmarking():
        ...     pass
    """
    checks.boolean("enabled", enabled)
    return settings.benchmark.within(enabled)


def describe(x: Tensor, operator: Operator | None = None) -> Call:
    """Return the facts about a call that backends decide by."""
    functions = None if operator is None else operator.constants[:3]
    recorded = torch.is_grad_enabled() and recording()
    index = x.device.index or 0
    return Call(x.device.type, x.dtype, is_transformed(), index, functions, recorded)


def setting() -> str:
    """Return the backend's name, or ``auto``, that holds for a call which names none."""
    own = settings.backend.own()
    return _default if own is None else own


def is_transformed() -> bool:
    """Return whether a torch.func transform or a forward-mode derivative is active, eagerly."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


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


def choose(x: Tensor, requested: str | None = None, operator: Operator | None = None) -> Backend:
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
        return _BACKENDS[names.index("reference")]
    meant = (*_FAST.get(call.device, ()), "reference")
    for backend in _BACKENDS:
        if backend.name in meant and backend.why_not(call) is None:
            break
    if backend.name == "reference" and not call.transformed:
        _warn_slow(call)
    return backend


def _warn_slow(call: Call) -> None:
    if torch.compiler.is_compiling():
        return
    reasons = [
        f"{backend.name}: {backend.why_not(call)}"
        for backend in _BACKENDS
        if backend.name in _FAST.get(call.device, ())
    ]
    if reasons:
        said = "; ".join(reasons)
        warn_once(f"the plain PyTorch reference runs on {call.device} tensors ({said})")


_STRATEGIES = {"fused": "one pass", "library": "passes around the library convolution"}


def _cpu_strategies(operands: Operands, problem: Problem) -> list[str]:
    x, weight, *_ = operands
    geometry = native.conv2d_arguments(operands, problem)[6:14]
    taken = torch.ops.dcconv.cpu_strategies(x, weight, *geometry)
    return [
        f"    {direction}: {_STRATEGIES[name]}"
        for direction, name in zip(("forward", "backward"), taken, strict=True)
    ]


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

    Under the cuda and triton backends stand the plans of each direction: the choice, how it was
    made, and every plan's time, where it was measured, or refusal. Under the cpu backend stands
    whether a direction takes one pass or the passes around the library convolution. Nothing is
    measured for the report.

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
            state += f" ({torch.ops.dcconv.cpu_isa()} instructions)"
        lines.append(f"  {candidate.name:<10}{state}")
        if candidate.name == "cpu" and reason is None:
            lines += _cpu_strategies(operands, problem)
        if candidate.name in key.BACKENDS and reason is None:
            planned = strategy.describe(candidate.name, operands, problem, mode, _benchmarks())
            lines += [f"    {line}" for line in planned]
    if chosen.name != "reference":
        kept_names = (
            "x and weight" if mode == NOTHING else f"x, weight, the norm map and the {mode}"
        )
        lines.append(f"  backward keeps {kept_names}")
    return "\n".join(lines)
