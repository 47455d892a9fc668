"""The operator as data: y = h g, and the input gradient's epilogue, in steps of a few primitives.

A graph compiler builds its graph from these steps (``dcconv.cudnn.ops``) and PyTorch can run them
(``evaluate``), so one can be judged by the other. The functions are those of
``dcconv.operator.functions``, taken apart for a machine that has

* one full tensor, the convolution's result u, in registers; maps of position, [n, 1, p, q], and
  vectors of filter, [1, o, 1, 1], that are read where they are needed; scalars, [1, 1, 1, 1];
* no inverse trigonometry: asin is the polynomial of ``csrc/elementary.h``, exact in float32;
* steps whose first operand must come from the convolution. Where a map meets a vector, u carries
  the map: ``zero + map`` with ``zero = max(min(u, 0), 0)``, which is 0 for infinite u too. A NaN in
  u may pass or become 0 there: y is NaN either way, by its factor g;
* a min and a max that may lose a NaN: nothing else there uses them, comparisons select instead.

What depends on the position alone or the filter alone is prepared before the convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dcconv.operator import functions
from dcconv.operator.numerics import RHO_FLOOR
from dcconv.operator.records import Problem

# What a value varies with; that of a step, with all that its operands vary with.
SCALAR, MAP, VECTOR = 0, 1, 2
FULL = MAP | VECTOR

Operand = str | float


class Step(NamedTuple):
    """``name = op(*operands)``; an operand is the name of a value or a constant."""

    name: str
    op: str
    operands: tuple[Operand, ...]


class Form(NamedTuple):
    """What the expression of an operator depends on.

    Attributes:
        magnitude, angular, weighting, alpha, beta, power: as in ``Problem``.
        scalar_radius, scalar_k: whether the tensor is [], not [o].
        scaled_radius: whether rho is the radius times a mean norm.
        bias: whether a bias is added.
    """

    magnitude: str
    angular: str
    weighting: str
    alpha: float = 1.0
    beta: float = 0.5
    power: float = 2.0
    scalar_radius: bool = False
    scalar_k: bool = False
    scaled_radius: bool = False
    bias: bool = False


class Expression(NamedTuple):
    """The epilogue of a convolution.

    Attributes:
        prepared: steps for PyTorch, ahead of the convolution.
        feeds: the tensors that the later steps read beside ``u``: name, what it varies with.
        steps: steps on the convolution's result ``u``.
        result: name of the last value.
    """

    prepared: tuple[Step, ...]
    feeds: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    result: str


#: The primitives as PyTorch computes them.
primitives: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "pow": torch.pow,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "log1p": torch.log1p,
    "min": torch.clamp_max,
    "max": torch.clamp_min,
    "greater": torch.gt,
    "less": torch.lt,
    "select": torch.where,
}


class _Program:
    """Steps in the making: equal ones are one, and a factor or power 1 is none."""

    def __init__(self, varies: Mapping[str, int]) -> None:
        self.varies = dict(varies)
        self.steps: list[Step] = []
        self._names: dict[tuple[Operand, ...], str] = {}

    def __call__(self, op: str, first: Operand, *more: Operand) -> str:
        if op in ("mul", "pow") and isinstance(first, str) and more == (1.0,):
            return first
        key = (op, first, *more)
        if key not in self._names:
            name = f"{op}{len(self.steps)}"
            self.steps.append(Step(name, op, (first, *more)))
            self._names[key] = name
            self.varies[name] = SCALAR
            for operand in (first, *more):
                self.varies[name] |= self.varies[operand] if isinstance(operand, str) else SCALAR
        return self._names[key]

    def carried(self, value: Operand) -> str:
        """Return a value that varies less than u as one that varies with everything."""
        zero = self("max", self("min", "u", 0.0), 0.0)
        return self("add", zero, value)

    def expression(self, result: str) -> Expression:
        """Keep the steps that the result needs, split at the convolution."""
        needed: set[str] = {result}
        steps: list[Step] = []
        for step in reversed(self.steps):
            if step.name in needed:
                needed |= {operand for operand in step.operands if isinstance(operand, str)}
                steps.insert(0, step)
        late = tuple(step for step in steps if self.varies[step.name] == FULL)
        made = {"u", *(step.name for step in late)}
        read = dict.fromkeys(x for step in late for x in step.operands if isinstance(x, str))
        return Expression(
            prepared=tuple(step for step in steps if step not in late),
            feeds=tuple((name, self.varies[name]) for name in read if name not in made),
            steps=late,
            result=result,
        )


def _at_most_one(p: _Program, value: str) -> str:
    """Return min(value, 1), and NaN for NaN."""
    one: Operand = p.carried(1.0) if p.varies[value] == FULL else 1.0
    return p("select", p("greater", value, 1.0), one, value)


def _asin(p: _Program, c: str) -> str:
    """Return asin c, clamped: t and s are c^2 and |c|, or those of the half angle above 1/2."""
    size = _at_most_one(p, p("abs", c))
    large = p("greater", size, 0.5)
    t = p("select", large, p("add", p("mul", size, -0.5), 0.5), p("mul", size, size))
    s = p("select", large, p("sqrt", t), size)
    series = p("mul", t, 0.0381963216)
    for coefficient in (0.0264993571, 0.0450099036, 0.0749881342):
        series = p("mul", p("add", series, coefficient), t)
    series = p("add", series, 0.166666731)
    small = p("add", p("mul", p("mul", t, s), series), s)
    # pi/2 in two parts keeps the difference within an ulp.
    twice = p("add", p("mul", small, 2.0), 4.37113883e-08)
    angle = p("select", large, p("add", p("mul", twice, -1.0), 1.57079637), small)
    return p("select", p("less", c, 0.0), p("mul", angle, -1.0), angle)


def _over(p: _Program, value: str, divisor: str) -> str:
    return p("mul", value, p("reciprocal", divisor))


def _sigmoid_angle(p: _Program, operator: Form, c: str) -> str:
    half = p("mul", p("reciprocal", "k"), 0.5)
    scale = p("reciprocal", p("tanh", p("mul", half, torch.pi / 2)))
    return p("mul", p("tanh", p("mul", _asin(p, c), half)), scale)


def _power_angle(p: _Program, operator: Form, c: str) -> str:
    # c |c|^(power - 1): neither a sign nor a logarithm of 0.
    if operator.power == 1.0:
        return c
    return p("mul", c, p("pow", p("abs", c), operator.power - 1.0))


#: g of c, by name.
angles: dict[str, Callable[[_Program, Form, str], str]] = {
    "linear": lambda p, operator, c: p("mul", _asin(p, c), 2.0 / torch.pi),
    "cosine": lambda p, operator, c: c,
    "sigmoid": _sigmoid_angle,
    "square_cosine": lambda p, operator, c: p("mul", c, p("abs", c)),
    "power": _power_angle,
}

Factors = tuple[Operand, ...]


def _segmented(p: _Program, operator: Form, b: str, rho: str) -> Factors:
    beyond = p("add", p("mul", b, operator.beta), p("mul", rho, operator.alpha - operator.beta))
    return (p("select", p("less", b, rho), p("mul", b, operator.alpha), beyond),)


def _mix(p: _Program, operator: Form, b: str, rho: str) -> Factors:
    curved = p("mul", p("log1p", b), operator.beta)
    return (p("add", p("mul", b, operator.alpha), curved),)


#: h of b and rho, in factors, by name.
magnitudes: dict[str, Callable[[_Program, Form, str, str], Factors]] = {
    "sphere": lambda p, operator, b, rho: (operator.alpha,),
    "ball": lambda p, operator, b, rho: (_at_most_one(p, _over(p, b, rho)), operator.alpha),
    "tanh": lambda p, operator, b, rho: (p("tanh", _over(p, b, rho)), operator.alpha),
    "linear": lambda p, operator, b, rho: (b, operator.alpha),
    "segmented": _segmented,
    "log": lambda p, operator, b, rho: (p("log1p", b), operator.alpha),
    "mix": _mix,
}


def _product(p: _Program, operator: Form, h: Factors, rho: str) -> Factors:
    ratio = _over(p, "a", rho)
    return p("tanh", p("mul", p.carried("b"), ratio)), operator.alpha


#: h of the filter norm a, the unweighted h and rho, in factors, by name.
weightings: dict[str, Callable[[_Program, Form, Factors, str], Factors]] = {
    "none": lambda p, operator, h, rho: h,
    "linear": lambda p, operator, h, rho: ("a", *h),
    "product": _product,
    "separate": lambda p, operator, h, rho: (p("tanh", _over(p, "a", rho)), *h),
}


def _product_by_kind(p: _Program, factors: Iterable[Operand]) -> list[Operand]:
    """Multiply the factors of each kind, so that one of each is left, the constant in another."""
    kinds: dict[int, str] = {}
    constant = 1.0
    for factor in factors:
        if isinstance(factor, str):
            kind = p.varies[factor]
            kinds[kind] = p("mul", kinds[kind], factor) if kind in kinds else factor
        else:
            constant *= factor
    for kind in (SCALAR, VECTOR, MAP):
        if kind in kinds:
            kinds[kind], constant = p("mul", kinds[kind], constant), 1.0
    return [*(kinds[kind] for kind in sorted(kinds)), constant]


@functools.lru_cache(maxsize=256)
def forward(operator: Form) -> Expression:
    """Return y as an expression of u.

    The leaves beside ``u`` are ``b``, the norm map; ``a``, the filter norms; and what the operator
    has of ``radius``, ``mean``, ``k`` and ``bias``. Each has the shape of what it varies with.
    """
    radius = SCALAR if operator.scalar_radius else VECTOR
    p = _Program(
        {
            "u": FULL,
            "b": MAP,
            "a": VECTOR,
            "radius": radius,
            "mean": SCALAR,
            "k": SCALAR if operator.scalar_k else VECTOR,
            "bias": VECTOR,
        }
    )
    rho = p("mul", "radius", "mean") if operator.scaled_radius else "radius"
    rho = p("max", rho, RHO_FLOOR)
    uses_rho = functions.magnitudes[operator.magnitude].uses_rho
    b = p.carried("b") if uses_rho and radius == VECTOR else "b"
    h = magnitudes[operator.magnitude](p, operator, b, rho)
    h = weightings[operator.weighting](p, operator, h, rho)
    inverse_b, inverse_a = p("reciprocal", "b"), p("reciprocal", "a")
    if operator.angular == "cosine":
        # Linear in u: what divides it joins the factors of h, and a cancels.
        y = "u"
        h = h[1:] if h[0] == "a" else (inverse_a, *h)
        h = (inverse_b, *h)
    else:
        y = angles[operator.angular](p, operator, p("mul", p("mul", "u", inverse_b), inverse_a))
    for factor in _product_by_kind(p, h):
        y = p("mul", y, factor)
    if operator.bias:
        y = p("add", y, "bias")
    return p.expression(y)


#: The input gradient: u, the convolution's data gradient, plus x t. The map t is, at each pixel,
#: the sum of the taps of the windows that hold it.
input_gradient = Expression(
    prepared=(),
    feeds=(("x", FULL), ("t", MAP)),
    steps=(Step("part", "mul", ("x", "t")), Step("y", "add", ("u", "part"))),
    result="y",
)


def evaluate(steps: Iterable[Step], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run steps with PyTorch in the dtype of their leaves; return the leaves and all results."""
    found = dict(values)
    for name, op, operands in steps:
        found[name] = primitives[op](*(found[x] if isinstance(x, str) else x for x in operands))
    return found


def why_not(problem: Problem) -> str | None:
    """Return one sentence why a call is no single expression on a convolution, None if it is."""
    if problem.operator.norm_free:
        return "the operator needs no norm: it is a library convolution already"
    for name, known in (
        (problem.operator.magnitude, magnitudes),
        (problem.operator.angular, angles),
        (problem.operator.weighting, weightings),
    ):
        if name not in known:
            return f"'{name}' is not written in terms of its primitives"
    if problem.window.groups != 1:
        groups = problem.window.groups
        return f"it reads one map for all filters, and each of {groups} groups has its own"
    if not problem.window.symmetric_zeros:
        return "it pads with zeros, as much before as after"
    return None
