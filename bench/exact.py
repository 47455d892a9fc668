"""Values and derivatives of every function in numpy's long double, the truth for float64.

Written from the formulas, derivatives by hand, so that nothing is shared with what is measured. A
test compares them with the Python specification in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: None where long double has more digits than float64, else one sentence.
why_not: str | None = (
    None
    if np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant
    else "long double is float64 on this platform: there is no truth for ulp of float64"
)

#: What is written down here. Another function has no truth for ulp of float64.
MAGNITUDES = ("sphere", "ball", "tanh", "linear", "segmented", "log", "mix")
ANGULARS = ("linear", "cosine", "square_cosine", "power", "sigmoid")


def why_not_function(name: str, is_magnitude: bool) -> str | None:
    """Return None where a function has its truth here, else one sentence.

    Example:
        >>> why_not_function("tanh", True), why_not_function("new", True)
        (None, "bench/exact.py does not have 'new'")
    """
    if why_not is not None:
        return why_not
    known = MAGNITUDES if is_magnitude else ANGULARS
    return None if name in known else f"bench/exact.py does not have '{name}'"


_PI = 4 * np.arctan(np.longdouble(1))


def _wide(t: Array) -> Array:
    return t.astype(np.longdouble)


def _tanh(z: Array) -> tuple[Array, Array]:
    """Return tanh and its derivative, which does not cancel where tanh is nearly 1."""
    with np.errstate(over="ignore"):
        return np.tanh(z), 1 / np.cosh(z) ** 2


def magnitude(
    name: str, weighting: str, a: Array, b: Array, rho: Array, alpha: float, beta: float
) -> Sequence[Array]:
    """Return h, dh/db, dh/drho and dh/da; arguments are float64, results long double."""
    a, b, rho = _wide(a), _wide(b), _wide(rho)
    zero, one = np.zeros_like(b), np.ones_like(b)
    if weighting == "product":
        t, slope = _tanh(a * b / rho)
        slope = alpha * slope
        return alpha * t, slope * a / rho, -slope * a * b / rho**2, slope * b / rho
    if name == "sphere":
        h, h_b, h_rho = alpha * one, zero, zero
    elif name == "ball":
        inside = b <= rho
        h = alpha * np.where(inside, b / rho, one)
        h_b = alpha * np.where(inside, 1 / rho, zero)
        h_rho = -alpha * np.where(inside, b / rho**2, zero)
    elif name == "tanh":
        t, slope = _tanh(b / rho)
        h, h_b, h_rho = alpha * t, alpha * slope / rho, -alpha * slope * b / rho**2
    elif name == "linear":
        h, h_b, h_rho = alpha * b, alpha * one, zero
    elif name == "segmented":
        below = b < rho
        h = np.where(below, alpha * b, beta * b + (alpha - beta) * rho)
        h_b = np.where(below, alpha * one, beta * one)
        h_rho = np.where(below, zero, (alpha - beta) * one)
    elif name == "log":
        h, h_b, h_rho = alpha * np.log1p(b), alpha / (1 + b), zero
    else:
        assert name == "mix"
        h, h_b, h_rho = alpha * b + beta * np.log1p(b), alpha + beta / (1 + b), zero
    if weighting == "linear":
        return h * a, h_b * a, h_rho * a, h
    if weighting == "separate":
        t, slope = _tanh(a / rho)
        return h * t, h_b * t, h_rho * t - h * slope * a / rho**2, h * slope / rho
    assert weighting == "none"
    return h, h_b, h_rho, zero


def angular(name: str, c: Array, k: Array, power: float, delta: float) -> Sequence[Array]:
    """Return g, dg/dc and dg/dk; arguments are float64, results long double."""
    c, k = _wide(c), _wide(k)
    zero, one = np.zeros_like(c), np.ones_like(c)
    angle = np.arcsin(np.clip(c, -1, 1))
    angle_c = 1 / np.sqrt(np.maximum((1 - c) * (1 + c), np.longdouble(delta)))
    if name == "linear":
        return 2 / _PI * angle, 2 / _PI * angle_c, zero
    if name == "cosine":
        return c, one, zero
    if name == "square_cosine":
        return c * np.abs(c), 2 * np.abs(c), zero
    if name == "power":
        size = np.abs(c)
        return np.sign(c) * size**power, power * size ** (power - 1), zero
    assert name == "sigmoid"
    t, slope = _tanh(angle / (2 * k))
    end, end_slope = _tanh(_PI / (4 * k))
    g_k = (t * end_slope * _PI / (4 * k**2) / end - slope * angle / (2 * k**2)) / end
    return t / end, slope * angle_c / (2 * k) / end, g_k
