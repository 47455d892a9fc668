"""Every magnitude, weighting and angular function of the operator family, in plain PyTorch.

This file is the executable specification of the functions; ``csrc/functions.h`` holds the same
lists for the compiled kernels, and a test compares the two. Adding a function means one decorated
function here and one struct there. One that is registered here alone, by a user's module for
instance, runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcconv.operator.numerics import constant

MagnitudeValue = Callable[[Tensor, "Tensor | None", float, float], Tensor]
AngularValue = Callable[[Tensor, "Tensor | None", float, float], Tensor]


@dataclass(frozen=True)
class Magnitude:
    """A magnitude function h of the patch norm b, spec equation names as in the paper.

    ``uses_rho`` says whether the radius appears; ``formula`` is the text shown in the README.
    """

    name: str
    value: MagnitudeValue
    uses_rho: bool
    formula: str


@dataclass(frozen=True)
class Angular:
    """An angular function g of the cosine c.

    ``uses_k`` says whether the curvature appears. ``invertible`` says whether c is recovered from
    g at full relative accuracy, which lets backward keep the output instead of the dot product.
    """

    name: str
    value: AngularValue
    uses_k: bool
    invertible: bool
    formula: str


@dataclass(frozen=True)
class Weighting:
    """How the filter norm a enters the magnitude; ``only_with`` restricts the magnitude."""

    name: str
    only_with: str | None
    formula: str


magnitudes: dict[str, Magnitude] = {}
angulars: dict[str, Angular] = {}


def _enter(kind: str, function: Any, known: dict[str, Any]) -> None:
    """Enter a function, but not by another's name: the kernels would go on computing that one."""
    name, value, before = function.name, function.value, known.get(function.name)
    # A cell or module that runs again defines its own function again.
    again = before is not None and (
        (before.value.__module__, before.value.__qualname__)
        == (value.__module__, value.__qualname__)
    )
    if before is not None and not again:
        raise ValueError(f"dcconv: {kind} must be a new name, got '{name}'")
    known[name] = function


def magnitude(formula: str, *, rho: bool = False) -> Callable[[MagnitudeValue], MagnitudeValue]:
    """Register a magnitude function h under its own name, without a trailing underscore.

    The function is called with b, the patch norms, rho, the radius (None unless ``rho``), both
    [n, groups or o, p, q] or what broadcasts to it, and the numbers alpha and beta; it returns h,
    made of differentiable operations, positive for positive b. Backends whose kernels do not have
    it refuse it, so that it runs on the reference.

    Args:
        formula: what it computes, for people.
        rho: whether it has a radius.

    Raises:
        ValueError: another function has this name.

    Example:
        >>> import torch, dcconv
        >>> @dcconv.operator.functions.magnitude("alpha * sqrt(b)")
        ... def root(b, rho, alpha, beta):
        ...     return alpha * b.sqrt()
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> dcconv.decoupled_conv2d(x, w, magnitude="root", backend="reference").shape
        torch.Size([2, 4, 6, 6])
        >>> del dcconv.operator.functions.magnitudes["root"]
    """

    def register(value: MagnitudeValue) -> MagnitudeValue:
        name = value.__name__.rstrip("_")
        _enter("magnitude", Magnitude(name, value, rho, formula), magnitudes)
        return value

    return register


def angular(
    formula: str, *, k: bool = False, invertible: bool = False
) -> Callable[[AngularValue], AngularValue]:
    """Register an angular function g under its own name, without the ``_angle`` suffix.

    The function is called with c, the cosines, [n, o, p, q], k, the curvature (None unless ``k``,
    broadcasts with c), and the numbers power and delta, the floor of (1 - c)(1 + c) in
    derivatives; it returns g, made of differentiable operations. Backends whose kernels do not
    have it refuse it, so that it runs on the reference.

    Args:
        formula: what it computes, for people.
        k: whether it has a curvature.
        invertible: whether c is recovered from g at full relative accuracy.

    Raises:
        ValueError: another function has this name.

    Example:
        >>> import torch, dcconv
        >>> @dcconv.operator.functions.angular("c * c * c")
        ... def cube_angle(c, k, power, delta):
        ...     return c * c * c
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> dcconv.decoupled_conv2d(x, w, angular="cube", backend="reference").shape
        torch.Size([2, 4, 6, 6])
        >>> del dcconv.operator.functions.angulars["cube"]
    """

    def register(value: AngularValue) -> AngularValue:
        name = value.__name__.removesuffix("_angle")
        _enter("angular", Angular(name, value, k, invertible, formula), angulars)
        return value

    return register


def tanh_of(z: Tensor) -> Tensor:
    """tanh of z with an exact derivative, 4 e / (1 + e)^2 with e = exp(-2 |z|).

    Autograd's derivative of ``torch.tanh`` is 1 - tanh(z)^2, which cancels: near saturation its
    relative error is exp(2 |z|) / 4 roundings, and from z = 19 on it is 0 in float64.
    """
    size = z.abs()
    e = torch.exp(-2.0 * size)
    # The quotient cancels for small z, where the library's derivative does not.
    return torch.where(size < 0.5, torch.tanh(z), torch.sign(z) * ((1.0 - e) / (1.0 + e)))


@magnitude("alpha")
def sphere(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    return torch.full_like(b, alpha)


@magnitude("alpha * min(b, rho) / rho", rho=True)
def ball(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    assert rho is not None
    # b == rho counts as inside: the official code's relu(b - rho) has derivative 0 there.
    # NaN fails b > rho and must come out as NaN: b / rho keeps it.
    return alpha * torch.where(b > rho, torch.ones_like(b / rho), b / rho)


@magnitude("alpha * tanh(b / rho)", rho=True)
def tanh(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    assert rho is not None
    return alpha * tanh_of(b / rho)


@magnitude("alpha * b")
def linear(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    return alpha * b


@magnitude("alpha * b if b < rho else beta * b + (alpha - beta) * rho", rho=True)
def segmented(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    assert rho is not None
    # b == rho counts as outside, as in the official code (the paper writes <=; the value agrees).
    return torch.where(b < rho, alpha * b, beta * b + (alpha - beta) * rho)


@magnitude("alpha * log(1 + b)")
def log(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    return alpha * torch.log1p(b)


@magnitude("alpha * b + beta * log(1 + b)")
def mix(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
    return alpha * b + beta * torch.log1p(b)


weightings: dict[str, Weighting] = {
    w.name: w
    for w in (
        Weighting("none", None, "h(b)"),
        Weighting("linear", None, "a * h(b)"),
        Weighting("product", "tanh", "alpha * tanh(a * b / rho)"),
        Weighting("separate", "tanh", "alpha * tanh(b / rho) * tanh(a / rho)"),
    )
}


def weighted_magnitude(
    name: str, weighting: str, a: Tensor, b: Tensor, rho: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """Evaluate h(a, b; alpha, beta, rho) for a magnitude and a weighting (spec 1.2 and 1.4).

    Args:
        name: a key of ``magnitudes``.
        weighting: a key of ``weightings``.
        a: filter norms, broadcastable against ``b``.
        b: patch norms, broadcastable against ``a``.
        rho: operator radius, broadcastable; None for magnitudes without one.
        alpha: scale, positive.
        beta: second slope, not negative.

    Returns:
        h, broadcast shape of the arguments.
    """
    if weighting == "product":
        assert rho is not None
        return alpha * tanh_of(a * b / rho)
    h = magnitudes[name].value(b, rho, alpha, beta)
    if weighting == "linear":
        return h * a
    if weighting == "separate":
        assert rho is not None
        return h * tanh_of(a / rho)
    # A name in the table alone would be taken for no weighting.
    assert weighting == "none", weighting
    return h


def capped_asin(c: Tensor, delta: float) -> Tensor:
    """asin of c clamped to [-1, 1], whose derivative is 1 / sqrt(max((1 - c)(1 + c), delta)).

    The slope of asin is unbounded at the ends and rounding moves c past them, so the derivative
    is capped, not zeroed. Differentiable any number of times.
    """
    bound = (1.0 - delta) ** 0.5
    inside = c.clamp(-bound, bound)
    # Autograd divides the slope of atan2 by sqrt((1 - c)(1 + c)); asin's uses 1 - c * c, which
    # cancels near 1.
    angle = torch.atan2(inside, torch.sqrt((1.0 - inside) * (1.0 + inside)))
    # One branch is selected, not a difference formed: slopes of 1e6 would cancel. Equality belongs
    # to the outer one: clamp has no slope where c is the bound as c's dtype rounds it.
    beyond = torch.asin(c.detach().clamp(-1.0, 1.0)) + (c - c.detach()) * delta**-0.5
    return torch.where(c.abs() >= bound, beyond, angle)


@angular("(2 / pi) * asin(c)", invertible=True)
def linear_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
    pi: float = constant("PI")
    return capped_asin(c, delta) * (2.0 / pi)


@angular("c", invertible=True)
def cosine_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
    return c


@angular("tanh(asin(c) / (2 * k)) / tanh(pi / (4 * k))", k=True)
def sigmoid_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
    assert k is not None
    pi: float = constant("PI")
    return tanh_of(capped_asin(c, delta) / (2.0 * k)) / tanh_of(pi / (4.0 * k))


@angular("sign(c) * c * c", invertible=True)
def square_cosine_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
    return c * c.abs()


@angular("sign(c) * abs(c) ** power")
def power_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
    size = c.abs()
    # 0 ** (power - 1) has no derivative for power < 2: zero takes the defined one-sided limit.
    safe = torch.where(size > 0, size, torch.ones_like(size))
    at_zero = c if power == 1.0 else c * 0.0
    # NaN fails size > 0 and must come out as NaN: c * 0 keeps it.
    return torch.where(size > 0, torch.sign(c) * safe**power, at_zero)
