"""The one accuracy rule, for every output and gradient; numbers: dcconv/operator/numerics.py.

    truth  = reference(inputs.double())   of the already rounded inputs, delta of the tested dtype
    peer   = reference(inputs)            same dtype, plain PyTorch
    err(t) = max(max abs(t - truth) / max abs(truth), rms(t - truth) / rms(truth))
    accept : err(kernel) <= 2 * min(err(peer), 8 * floor) + floor
    or     : err(kernel) <= 4 * noise(t)

noise(t) is the largest err that rounding the intermediates of the float64 reference once makes, in
several draws: the condition of the problem (rounding_noise.py; docs/accuracy.md derives it). It is
far below the floor but where a result is the rest of a cancellation, and is only looked at, by
:func:`judge`, where the first line is broken.

A non-finite peer counts as 8 floors. A kernel value that is not finite where the truth is finite
fails, and so does a finite value where the truth is not: NaN and infinity must propagate. An empty
tensor has no error. A truth that is zero everywhere has no scale to be relative to; such zeros come
from zero factors (a zero filter, a zero patch), which every arithmetic keeps, so the kernel must
return exact zeros. So small a truth that a factor of it may be below the normal numbers of the
compute dtype, a saturated magnitude's, counts as zero, and must be as small in the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import torch
from calls import convolution
from cases import Inputs
from rounding_noise import Noise
from torch import Tensor

from dcconv.operator import reference
from dcconv.operator.numerics import (
    ACCURACY_FLOOR,
    NOISE_FACTOR,
    PEER_CAP,
    PEER_FACTOR,
    angle_delta,
    compute_dtype,
)

# Records of the official code were computed in float32: their distance to a float64 evaluation,
# relative to the record's norm, is at most 7e-6.
RECORD_TOLERANCE = 1e-5
PRINTED_UNITS = 2

# Draws of rounding errors, half of them alike in all elements of a tensor.
NOISE_DRAWS = 8

Results = dict[str, Tensor]


def error(value: Tensor, truth: Tensor) -> float:
    """Return err(value): the larger of the maximal and the mean square relative distance.

    Values that are not finite in the truth are left out; infinity if ``value`` has others.
    """
    arithmetic = torch.finfo(compute_dtype(value.dtype))
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    finite = truth.isfinite()
    value, truth = value[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0
    if not bool(value.isfinite().all()):
        return math.inf
    difference = (value - truth).abs()
    largest = float(truth.abs().max())
    if 0.0 < largest < arithmetic.tiny / arithmetic.eps:
        return 0.0 if float(value.abs().max()) < arithmetic.tiny / arithmetic.eps else math.inf
    if largest == 0.0:
        return 0.0 if float(difference.max()) == 0.0 else math.inf
    # Scaled first: squares of tiny gradients would underflow.
    difference, truth = difference / largest, truth / largest
    mean_square = float(difference.square().mean().sqrt() / truth.square().mean().sqrt())
    return max(float(difference.max()), mean_square)


def limit(peer_error: float, dtype: torch.dtype) -> float:
    """Return the largest acceptable err(kernel) next to a peer's."""
    floor = ACCURACY_FLOOR[dtype]
    capped = min(peer_error, PEER_CAP * floor) if math.isfinite(peer_error) else PEER_CAP * floor
    return PEER_FACTOR * capped + floor


def check(
    name: str,
    got: Tensor,
    truth: Tensor,
    peer: Tensor,
    dtype: torch.dtype,
    noise: Callable[[], float] = lambda: 0.0,
) -> None:
    """Accept a tensor by the rule, or raise with all numbers.

    Args:
        name: what is checked, shown in the message: case and tensor.
        got: the tensor under test; shape of ``truth``, any dtype and layout.
        truth: the float64 reference.
        peer: the reference in the tested dtype.
        dtype: the tested dtype, that is x's.
        noise: returns noise(t); asked where the rule is broken without it.

    Raises:
        AssertionError: the shape, a non-finite value or the error is not acceptable.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}")
    lost = (got.detach().cpu().isfinite() & ~truth.detach().cpu().isfinite()).sum()
    if int(lost):
        raise AssertionError(f"{name}: {int(lost)} finite values where the truth is not finite")
    kernel_error, peer_error = error(got, truth), error(peer, truth)
    allowed = limit(peer_error, dtype)
    if kernel_error <= allowed:
        return
    moved = noise()
    if not kernel_error <= NOISE_FACTOR * moved:
        raise AssertionError(
            f"{name} ({dtype}): err(kernel) {kernel_error:.3e} > limit {allowed:.3e}; "
            f"err(peer) {peer_error:.3e}, floor {ACCURACY_FLOOR[dtype]:.1e}, noise {moved:.1e}, "
            f"max |truth| {float(truth.detach().abs().max()):.3e}"
        )


def check_all(
    name: str,
    got: Results,
    truth: Results,
    peer: Results,
    dtype: torch.dtype,
    noise: Callable[[], dict[str, float]] = dict,
) -> None:
    """Apply :func:`check` to every tensor of ``truth``; the names must agree."""
    if got.keys() != truth.keys():
        raise AssertionError(f"{name}: results {sorted(got)}, expected {sorted(truth)}")
    for tensor in truth:
        check(
            f"{name}: {tensor}",
            got[tensor],
            truth[tensor],
            peer[tensor],
            dtype,
            lambda tensor=tensor: noise().get(tensor, 0.0),
        )


def same_numbers(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same numbers, infinity too, and NaN in the same places."""
    numbers = ~two.isnan()
    return torch.equal(~one.isnan(), numbers) and torch.equal(one[numbers], two[numbers])


def check_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Accept two ways of computing one thing in one dtype: the rule with an exact peer."""
    check(name, got, want.double(), want, want.dtype)


def evaluate(
    function: Callable[..., Tensor], inputs: Inputs, cotangent: Tensor | None = None, **extra: Any
) -> Results:
    """Call ``function(**tensors, **options, **extra)`` and differentiate it.

    Args:
        function: takes the arguments of ``dcconv.functional.decoupled_conv2d`` by name.
        inputs: the call.
        cotangent: gradient of y, [n, o, p, q]; without it only y is returned.

    Returns:
        ``y`` and, under each tensor argument's name, its gradient.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    y = function(**leaves, **inputs.options, **extra)
    results = {"y": y.detach()}
    if cotangent is not None:
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
        results.update(zip(leaves, grads, strict=True))
    return results


def reference_call(delta: float | None = None) -> Callable[..., Tensor]:
    """Return the reference as a function for :func:`evaluate`, with another asin cap if given."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        operands, problem = convolution(x, weight, bias, **options)
        if delta is not None:
            problem = problem._replace(delta=delta)
        y, _ = reference.forward(operands, problem)
        return y if x.dim() == 4 else y.squeeze(0)

    return call


def random_cotangent(inputs: Inputs, seed: int = 1) -> Tensor:
    """Return a random gradient of y in x's dtype and device: 0.5 normal + sign(y - bias).

    Sums over positions (the gradients of radius, norm_mean and k) have terms dy g(c) times a factor
    of one sign, that of h g = y - bias: with it their terms do not cancel. A scalar that is the
    rest of a cancelled sum would have few digits left to compare.
    """
    unbiased = {name: t for name, t in inputs.tensors.items() if name != "bias"}
    with torch.no_grad():
        y = reference_call()(**unbiased, **inputs.options)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
    return (0.5 * noise + y.double().sign()).to(y.dtype)


def truth_and_peer(inputs: Inputs, cotangent: Tensor | None = None) -> tuple[Results, Results]:
    """Evaluate the reference in float64 on the rounded inputs, and in the tested dtype.

    Args:
        inputs: the call, rounded to the tested dtype.
        cotangent: gradient of y in the tested dtype; without it only y is evaluated.

    Returns:
        Truth and peer, as :func:`evaluate` returns them.
    """
    wide = Inputs({name: t.double() for name, t in inputs.tensors.items()}, inputs.options)
    wide_cotangent = None if cotangent is None else cotangent.double()
    truth = evaluate(reference_call(angle_delta(inputs.tensors["x"])), wide, wide_cotangent)
    return truth, evaluate(reference_call(), inputs, cotangent)


def rounding_noise(inputs: Inputs, cotangent: Tensor | None, truth: Results) -> dict[str, float]:
    """Return noise(t) for every tensor of ``truth``."""
    dtype = inputs.tensors["x"].dtype
    wide = Inputs({name: t.double() for name, t in inputs.tensors.items()}, inputs.options)
    wide_cotangent = None if cotangent is None else cotangent.double()
    largest = dict.fromkeys(truth, 0.0)
    for draw in range(NOISE_DRAWS):
        with Noise(dtype, draw, alike=draw % 2 == 1).in_the_reference():
            moved = evaluate(reference_call(angle_delta(inputs.tensors["x"])), wide, wide_cotangent)
        for name in truth:
            largest[name] = max(largest[name], error(moved[name], truth[name]))
    return largest


def judge(name: str, inputs: Inputs, cotangent: Tensor | None, got: Results) -> None:
    """Accept the results of a call by the rule, the condition of the problem included."""
    truth, peer = truth_and_peer(inputs, cotangent)
    found: dict[str, float] = {}

    def noise() -> dict[str, float]:
        if not found:
            found.update(rounding_noise(inputs, cotangent, truth))
        return found

    check_all(name, got, truth, peer, inputs.tensors["x"].dtype, noise)


def check_record(name: str, got: Tensor, recorded: Tensor) -> None:
    """Accept a tensor next to a float32 record of the official code, by the record's norm."""
    if got.shape != recorded.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, recorded {list(recorded.shape)}")
    recorded = recorded.double()
    distance = float((got.detach().double() - recorded).norm() / recorded.norm())
    if not distance <= RECORD_TOLERANCE:
        raise AssertionError(f"{name}: distance {distance:.3e} > {RECORD_TOLERANCE:.1e} of norm")


def check_printed(name: str, got: float | Tensor, printed: str) -> None:
    """Accept a number next to printed digits, to two units of the last place; ``0`` is exact."""
    exponent = Decimal(printed).as_tuple().exponent
    if not isinstance(exponent, int):
        raise AssertionError(f"{name}: {printed!r} is not a finite number")
    allowed = PRINTED_UNITS * 10.0**exponent if float(printed) else 0.0
    value = float(got)
    if not abs(value - float(printed)) <= allowed:
        raise AssertionError(f"{name}: {value!r}, printed {printed}, allowed {allowed:.1e}")
