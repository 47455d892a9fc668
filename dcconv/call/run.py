"""Runs a call: checks it against its records, chooses a backend, and calls it.

A layer of 8 channels on 4x4 pixels takes microseconds, and so do checks. What they say depends on
static facts alone (sizes, strides, dtypes, devices, records, settings), so a call whose facts have
been checked is run at once: ``_prepared`` has them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcconv import backends
from dcconv.call.runner import Runner
from dcconv.call.saved import kept
from dcconv.operator import arguments, checks
from dcconv.operator.convolution import batched, fitted
from dcconv.operator.functions import Angular, Magnitude, angulars, magnitudes
from dcconv.operator.layout import PLAIN
from dcconv.operator.numerics import compute_dtype, tf32_convolutions
from dcconv.operator.records import (
    Geometry,
    Learned,
    Operands,
    Operator,
    Problem,
    as_compute,
    knows_autocast,
    without_autocast,
)
from dcconv.pixel_sums import PixelSums
from dcconv.tracing import quietly, recording


class Arguments(NamedTuple):
    """One call, as a layer or the functional makes it: tensors and checked records."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    radius: Tensor | float | Learned
    norm_mean: Tensor | str | None
    k: Tensor | float
    operator: Operator
    geometry: Geometry
    keep: str = "auto"
    backend: str | None = None
    norm_grad: bool = True
    sums: PixelSums | None = None  # of x, where whoever wrote x has found them


class Prepared(NamedTuple):
    """What is known of a call whose facts have been checked.

    Attributes:
        problem: the call without its tensors.
        squares: the same with a raw radius, where that is squared by the backend's own function.
        backend: what runs it.
        mode: what its backward keeps.
        image: whether x is [c, h, w].
        fits: whether x and weight are operands as they are.
        radius, k: the operands of plain numbers on the CPU; None where a call makes its own, and
            for operators without them.
        uses_rho, uses_k: whether the operator has them.
        magnitude, angular: the functions, of which another may be registered under the same name.
    """

    problem: Problem
    squares: Problem | None
    backend: Runner
    mode: str
    image: bool
    fits: bool
    radius: Tensor | None
    k: Tensor | None
    uses_rho: bool
    uses_k: bool
    magnitude: Magnitude
    angular: Angular

    def holds(self, operator: Operator) -> bool:
        """Whether the operator's functions are still these."""
        return (
            magnitudes.get(operator.magnitude) is self.magnitude
            and angulars.get(operator.angular) is self.angular
        )


# Emptied when full: images of ever new sizes would fill it.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Prepared] = {}


def forget() -> None:
    """Have every call checked again, and its backend chosen anew."""
    _prepared.clear()


def _autocast(call: Arguments) -> Arguments:
    """Cast x, weight and bias to the autocast dtype, where autocast is on for x's device."""
    x = call.x
    if not isinstance(x, Tensor) or not knows_autocast(x):
        return call
    if not torch.is_autocast_enabled(x.device.type):
        return call
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        # float64 stays, as in PyTorch's own autocast.
        wanted = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if wanted else t

    as_cast = cast(x)
    sums = call.sums if as_cast is x else None
    return call._replace(x=as_cast, weight=cast(call.weight), bias=cast(call.bias), sums=sums)


_tracing = torch._C._is_tracing
_autocasts = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active

# Arguments that are what they say.
_CONSTANTS = (float, int, str, type(None))


def _facts_of(t: Any) -> Any:
    """Return the static facts of a plain tensor, a number or None; None for anything else."""
    kind = type(t)
    if kind in PLAIN:
        return t.shape, t.stride(), t.dtype, t.device, t.layout
    if kind in _CONSTANTS:
        return kind, t
    if kind is Learned:
        return _facts_of(t.raw)
    return None


def _facts(call: Arguments) -> tuple[Any, ...] | None:
    """Return what the checks and choices of a call depend on; None where it is more than this."""
    x, weight, bias, radius, norm_mean, k = call[:6]
    if (
        type(x) not in PLAIN
        or type(weight) not in PLAIN
        or _tracing()
        or _autocasts()
        or _transforms()
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        # Tensors that are no arrays have no strides, or no shape: the checks have their sentences.
        others = (_facts_of(bias), _facts_of(radius), _facts_of(norm_mean), _facts_of(k))
        if None in others:
            return None
        facts = (x.shape, x.stride(), x.dtype, x.device, x.layout, _facts_of(weight), others)
    except RuntimeError:
        return None
    tf32 = x.is_cuda and tf32_convolutions()
    return facts, call[6:-1], backends.setting(), tf32


def conv2d(call: Arguments) -> tuple[Tensor, Tensor | None]:
    """Run a decoupled convolution and also return the batch's mean norm, detached.

    The mean is a scalar in compute dtype where ``norm_mean="batch"`` and the magnitude has a
    radius, else None or an empty tensor. The layer keeps its moving average from it.
    """
    facts: tuple[Any, ...] | None = None
    if not torch.compiler.is_compiling():
        facts = _facts(call)
        known = None if facts is None else _prepared.get(facts)
        if known is not None and known.holds(call.operator):
            operands, problem = _operands(call, known)
            sums = None if call.sums is None else call.sums.fitting(operands, problem)
            y, mean = known.backend.conv2d(operands, problem, known.mode, sums)
            if mean is not None and mean.requires_grad:
                mean = mean.detach()
            return y.squeeze(0) if known.image else y, mean
    with quietly() if recording() else nullcontext():
        call = _autocast(call)
        x, weight, bias, radius, norm_mean, k, operator, geometry, keep, backend, *_ = call
        if isinstance(radius, Learned):
            radius = radius.value(compute_dtype(x.dtype))
        checks.functions(operator.magnitude, operator.angular, operator.weighting)
        operands, problem = arguments.convolution(
            x, weight, bias, radius, norm_mean, k, operator, geometry, call.norm_grad
        )
        checks.choice("keep", keep, checks.KEEPS)
        if backend is not None:
            backends.check_name("backend", backend)
        chosen = backends.choose(operands.x, backend, operator)
        mode = kept(problem, operands.x.dtype, bias is not None, keep)
        sums = None if call.sums is None else call.sums.fitting(operands, problem)
    with without_autocast(operands.x):
        y, mean = chosen.conv2d(operands, problem, mode, sums)
    if facts is not None:
        _remember(facts, call._replace(radius=radius), operands, problem, chosen, mode)
    return y if x.dim() == 4 else y.squeeze(0), mean if mean is None else mean.detach()


def _remember(
    facts: tuple[Any, ...],
    call: Arguments,
    operands: Operands,
    problem: Problem,
    chosen: Runner,
    mode: str,
) -> None:
    """Keep what the checks of a call have said."""
    x, operator = call.x, call.operator

    def constant(value: Any, uses: bool) -> Tensor | None:
        # On a GPU a constant belongs to the stream that makes it, or to the graph that is captured.
        keeps = uses and x.device.type == "cpu" and not isinstance(value, Tensor)
        return as_compute(value, x) if keeps else None

    # Constants of inference mode could not be saved for backward.
    with torch.inference_mode(False):
        radius, k = constant(call.radius, operator.uses_rho), constant(call.k, operator.uses_k)
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[facts] = Prepared(
        problem=problem,
        squares=None if chosen.name == "reference" else problem._replace(learned=True),
        backend=chosen,
        mode=mode,
        image=x.dim() == 3,
        fits=operands.x is x and operands.weight is call.weight,
        radius=radius,
        k=k,
        uses_rho=operator.uses_rho,
        uses_k=operator.uses_k,
        magnitude=magnitudes[operator.magnitude],
        angular=angulars[operator.angular],
    )


def _as_compute(value: Tensor | float, x: Tensor) -> Tensor | None:
    """Return what ``as_compute`` does, where nothing traces."""
    if isinstance(value, Tensor) and value.dtype == compute_dtype(x.dtype):
        return value.clone() if torch.is_grad_enabled() and not value.requires_grad else value
    return as_compute(value, x)


def _operands(call: Arguments, known: Prepared) -> tuple[Operands, Problem]:
    """Return the operands and the problem of a call that has been checked before."""
    x, weight, bias, said, norm_mean, k = call[:6]
    radius, curvature, mean, problem = known.radius, known.k, None, known.problem
    if known.uses_rho:
        if isinstance(said, Learned):
            radius = said.raw
            if (
                known.squares is not None
                and torch.is_grad_enabled()
                and (radius.requires_grad or weight.requires_grad or x.requires_grad)
            ):
                problem = known.squares
            else:
                radius = said.value(compute_dtype(x.dtype))
        elif radius is None:
            radius = _as_compute(said, x)
        if isinstance(norm_mean, Tensor):
            mean = _as_compute(norm_mean, x)
    if known.uses_k and curvature is None:
        curvature = _as_compute(k, x)
    if not known.fits:
        x, weight = batched(x), fitted(weight)
    return Operands(x, weight, bias, radius, mean, curvature), problem


def patch_norm(
    x: Tensor, kernel_size: Any, geometry: Geometry, eps: float, backend: str | None
) -> Tensor:
    """Run a patch norm."""
    with quietly() if recording() else nullcontext():
        image, kernel, problem = arguments.patch_norm(x, kernel_size, geometry, eps)
    if backend is not None:
        backends.check_name("backend", backend)
    with without_autocast(x):
        b = backends.choose(image, backend).patch_norm(image, kernel, problem)
    return b if x.dim() == 4 else b.squeeze(0)
