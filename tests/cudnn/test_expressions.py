"""The operator in steps: every expression agrees with the reference, and has the promised form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, error, reference_call
from calls import convolution, problem_with
from cases import (
    ANGULARS_OF_PAPER,
    IN_STEPS,
    MAGNITUDES_OF_PAPER,
    WEIGHTED_MAGNITUDES,
    Inputs,
    by_id,
    make_inputs,
)
from torch import Tensor

from dcconv.cudnn import epilogue
from dcconv.cudnn.epilogue import FULL, MAP, SCALAR, VECTOR, Expression, Form
from dcconv.operator import functions, reference
from dcconv.operator.functions import angulars, magnitudes, weighted_magnitude, weightings
from dcconv.operator.numerics import ACCURACY_FLOOR, ANGLE_DELTA, RHO_FLOOR, angle_delta

IN_STEPS_MAGNITUDES = [pair for pair in WEIGHTED_MAGNITUDES if pair[0] in epilogue.magnitudes]
POLYNOMIAL = ("linear", "sigmoid")  # angular functions whose asin is a polynomial for float32

# Constants other than the defaults, so that none is folded away; powers below and above 2.
CONSTANTS = (
    {},
    {"alpha": 1.5, "beta": 0.25, "power": 1.0},
    {"alpha": 0.5, "beta": 3.0, "power": 1.5},
    {"alpha": 1.0, "beta": 0.0, "power": 3.0},
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def variants() -> list[Form]:
    """All operators in steps, with every constant and shape of the parameters among them."""
    return [
        Form(
            magnitude,
            angular,
            weighting,
            **CONSTANTS[i % len(CONSTANTS)],
            scalar_radius=i % 3 == shift,
            scalar_k=i % 5 == shift,
            scaled_radius=i % 2 == shift % 2,
            bias=i % 7 == shift,
        )
        for shift in range(3)
        for i, (magnitude, weighting, angular) in enumerate(IN_STEPS)
    ]


def run(expression: Expression, leaves: dict[str, Tensor]) -> Tensor:
    """Evaluate an expression as its users do: prepared values, then the feeds alone.

    The min and max of the later steps lose NaN, as those of a graph may.
    """
    ahead = {name: leaf for name, leaf in leaves.items() if name != "u"}
    ahead = epilogue.evaluate(expression.prepared, ahead)
    late = {"u": leaves["u"], **{name: ahead[name] for name, _ in expression.feeds}}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("min", torch.fmin), ("max", torch.fmax)):
            patch.setitem(
                epilogue.primitives, name, lambda x, c, f=function: f(x, torch.full_like(x, c))
            )
        return epilogue.evaluate(expression.steps, late)[expression.result]


def shaped(value: Tensor) -> Tensor:
    """Shape a [] or [o] parameter as a leaf."""
    return value.reshape(1, -1, 1, 1)


def evaluate_call(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Evaluate ``functional.decoupled_conv2d``'s call by its expression."""
    signature = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "norm_mean": None}
    usual = {"alpha": 1.0, "beta": 0.5, "power": 2.0, "eps": 1e-4, "radius": 1.0, "k": 0.3}
    arguments = {**signature, **usual, **options}
    operands, problem = convolution(x, weight, bias, **arguments)
    padding = problem.window.padding[::2]
    b = reference.window_norm(x, (weight.shape[2], weight.shape[3]), problem)
    radius, mean, k = operands.radius, operands.norm_mean, operands.k
    if problem.norm == "batch":
        mean = reference.mean_norm(b)
    leaves = {
        "u": F.conv2d(x, weight, None, problem.window.stride, padding, problem.window.dilation),
        "b": b,
        "a": shaped(reference.filter_norm(weight, problem.operator.eps)),
    }
    for name, leaf in (("radius", radius), ("mean", mean), ("k", k), ("bias", bias)):
        if leaf is not None:
            leaves[name] = shaped(leaf)
    operator = Form(
        problem.operator.magnitude,
        problem.operator.angular,
        problem.operator.weighting,
        problem.operator.alpha,
        problem.operator.beta,
        problem.operator.power,
        scalar_radius=radius is not None and radius.dim() == 0,
        scalar_k=k is not None and k.dim() == 0,
        scaled_radius=mean is not None,
        bias=bias is not None,
    )
    return run(epilogue.forward(operator), leaves)


def test_tables_name_the_functions() -> None:
    """A function may be without expression (graph refuses it then); these are not."""
    assert set(MAGNITUDES_OF_PAPER) <= set(epilogue.magnitudes)
    assert set(ANGULARS_OF_PAPER) <= set(epilogue.angles)
    assert set(epilogue.magnitudes) <= set(magnitudes)
    assert set(epilogue.angles) <= set(angulars)
    assert set(epilogue.weightings) == set(weightings)


@pytest.mark.parametrize("angular", epilogue.angles)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_operator_agrees_with_the_reference(angular: str, dtype: torch.dtype) -> None:
    for i, (magnitude, weighting) in enumerate(IN_STEPS_MAGNITUDES):
        for j in range(3):
            case = ("3x3-p1", "1x1-s2", "dilation2", "asymmetric")[(i + j) % 4]
            options = dict(CONSTANTS[(i + j) % len(CONSTANTS)])
            if angular != "power":
                options.pop("power", None)
            inputs = make_inputs(
                by_id(case),
                dtype,
                magnitude=magnitude,
                weighting=weighting,
                angular=angular,
                norm=("batch", "given", "none")[(i + j) % 3],
                bias=j == 1,
                scalar=j == 2,
                **options,
            )
            name = f"{magnitude} {weighting} {angular} {case}"
            got = evaluate_call(**inputs.tensors, **inputs.options)
            wide = Inputs({n: t.double() for n, t in inputs.tensors.items()}, inputs.options)
            truth = reference_call(angle_delta(inputs.tensors["x"]))(**wide.tensors, **wide.options)
            if dtype == torch.float64 and angular in POLYNOMIAL:
                # The polynomial itself, without rounding: within the rule for float32.
                assert error(got, truth) <= ACCURACY_FLOOR[torch.float32], name
                continue
            peer = reference_call()(**inputs.tensors, **inputs.options)
            check(name, got, truth, peer, dtype)


def extreme_leaves(operator: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cosines over [-1, 1] with zero, norms over eight decades and at the radius.

    The slope of asin enlarges the rounding of cosines near the ends: they have their own test.
    """
    end = 0.99 if operator.angular in POLYNOMIAL else 1.0
    cosines = torch.cat(
        [
            torch.linspace(-end, end, 41, dtype=torch.float64),
            torch.tensor([0.0, 1e-6, -1e-6, 0.5, -0.5], dtype=torch.float64),
        ]
    )
    norms = torch.cat([torch.logspace(-4, 4, 15, dtype=torch.float64), torch.tensor([0.75, 2.0])])
    filters = torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    b = norms.reshape(-1, 1, 1, 1).expand(-1, 1, 1, len(cosines)).to(dtype)
    a = shaped(filters).to(dtype)
    leaves = {"u": cosines.reshape(1, 1, 1, -1).to(dtype) * b * a, "b": b, "a": a}
    radius = torch.tensor(2.0) if operator.scalar_radius else torch.tensor([0.75, 2.0, 100.0])
    k = torch.tensor(0.3) if operator.scalar_k else torch.tensor([0.1, 0.3, 2.0])
    leaves["radius"], leaves["k"] = shaped(radius).to(dtype), shaped(k).to(dtype)
    if operator.scaled_radius:
        leaves["mean"] = torch.full((1, 1, 1, 1), 1.0, dtype=dtype)
    if operator.bias:
        leaves["bias"] = shaped(torch.tensor([0.5, -1.0, 0.25])).to(dtype)
    return leaves


def by_functions(operator: Form, leaves: dict[str, Tensor]) -> Tensor:
    """Evaluate an operator by ``dcconv.operator.functions``."""
    a, b = leaves["a"], leaves["b"]
    rho = leaves["radius"]
    if operator.scaled_radius:
        rho = rho * leaves["mean"]
    rho = rho.clamp(min=RHO_FLOOR)
    h = weighted_magnitude(
        operator.magnitude, operator.weighting, a, b, rho, operator.alpha, operator.beta
    )
    c = leaves["u"] / a / b
    delta = ANGLE_DELTA[torch.float32]
    y = h * angulars[operator.angular].value(c, leaves["k"], operator.power, delta)
    return y + leaves["bias"] if operator.bias else y


def test_extreme_values_agree_with_the_functions() -> None:
    for operator in variants():
        leaves = extreme_leaves(operator, torch.float32)
        truth = by_functions(operator, {name: t.double() for name, t in leaves.items()})
        peer = by_functions(operator, leaves)
        got = run(epilogue.forward(operator), leaves)
        # By norm: the largest of eight decades would hide the others.
        for i in range(truth.shape[0]):
            check(f"{operator} {i}", got[i], truth[i], peer[i], torch.float32)


@pytest.mark.parametrize("angular", POLYNOMIAL)
def test_asin_is_exact_to_the_ends(angular: str) -> None:
    operator = Form("sphere", angular, "none", scalar_k=True)
    near = 1.0 - torch.logspace(-7, -1, 200)
    cosines = torch.cat([near, -near, torch.tensor([1.0, -1.0, 1.0000001, -1.5, 0.5, -0.5, 0.0])])
    one = torch.ones(1, 1, 1, 1)
    leaves = {"u": cosines.reshape(1, 1, 1, -1), "b": one, "a": one, "k": 0.3 * one}
    leaves["radius"] = one
    truth = by_functions(operator, {name: t.double() for name, t in leaves.items()})
    got = run(epilogue.forward(operator), leaves)
    assert float((got - truth).abs().max()) < 3e-7
    assert float(got.abs().max()) <= 1.0 + 1.2e-7


def test_nan_and_infinity_are_not_lost() -> None:
    for operator in variants():
        expression = epilogue.forward(operator)
        leaves = extreme_leaves(operator, torch.float64)
        for name in ("u", "b", "a", "radius", "mean", "k", "bias"):
            used = {x for step in (*expression.prepared, *expression.steps) for x in step.operands}
            if name not in used:
                continue
            broken = dict(leaves)
            broken[name] = torch.full_like(leaves[name], math.nan)
            assert bool(run(expression, broken).isnan().all()), (operator, name)
        infinite = torch.full_like(leaves["u"], math.inf).copysign(leaves["u"])
        got = run(expression, {**leaves, "u": infinite})
        if operator.angular in POLYNOMIAL:  # a cosine is clamped
            want = run(
                expression, {**leaves, "u": infinite.sign() * 2.0 * leaves["a"] * leaves["b"]}
            )
            assert torch.equal(got, want), operator
        else:
            assert bool((got == infinite).all()), operator


def test_first_operand_of_every_late_step_comes_from_the_convolution() -> None:
    for operator in variants():
        expression = epilogue.forward(operator)
        varies = {"u": FULL, **{step.name: FULL for step in expression.steps}}
        for step in expression.steps:
            # cuDNN's select has the mask last.
            first = step.operands[1] if step.op == "select" else step.operands[0]
            assert first in varies, (operator, step)
        assert expression.steps[-1].name == expression.result


def test_steps_are_in_order_and_feeds_are_made() -> None:
    for operator in variants():
        expression = epilogue.forward(operator)
        leaves = {"b", "a", "radius", "mean", "k", "bias"}
        known = set(leaves)
        for step in expression.prepared:
            assert {x for x in step.operands if isinstance(x, str)} <= known
            known.add(step.name)
        feeds = {name for name, _ in expression.feeds}
        assert feeds <= known
        read: set[str] = set()
        made = {"u"}
        for step in expression.steps:
            names = {x for x in step.operands if isinstance(x, str)}
            assert names <= made | feeds
            read |= names
            made.add(step.name)
        assert feeds <= read


def test_feeds_have_the_shape_they_vary_with() -> None:
    shapes = {SCALAR: (1, 1, 1, 1), MAP: (17, 1, 1, 46), VECTOR: (1, 3, 1, 1)}
    for operator in variants():
        expression = epilogue.forward(operator)
        leaves = extreme_leaves(operator, torch.float32)
        values = epilogue.evaluate(expression.prepared, leaves)
        for name, kind in expression.feeds:
            assert tuple(values[name].shape) == shapes[kind], (operator, name)


def test_magnitudes_of_the_position_alone_are_one_map() -> None:
    """What varies with the position is one feed beside 1 / b, whatever the formula."""
    for magnitude, weighting in IN_STEPS_MAGNITUDES:
        for angular in epilogue.angles:
            operator = Form(magnitude, angular, weighting, scalar_radius=True)
            maps = [kind for _, kind in epilogue.forward(operator).feeds].count(MAP)
            most = 1 if angular == "cosine" else 2
            assert maps <= most + (weighting == "product"), operator


def test_default_operator_is_nine_steps() -> None:
    expression = epilogue.forward(Form("tanh", "cosine", "none", scaled_radius=True))
    assert [step.op for step in expression.steps] == [
        *("min", "max", "add", "mul", "tanh"),
        *("mul", "mul", "mul"),
    ]


def test_input_gradient() -> None:
    u, x, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    got = run(epilogue.input_gradient, {"u": u, "x": x, "t": t})
    assert torch.equal(got, u + x * t)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"magnitude": "linear"}, "library convolution already"),
        ({"groups": 4}, "each of 4 groups"),
        ({"padding": (0, 1, 0, 1)}, "as much before as after"),
        ({"padding_mode": "circular", "padding": (1, 1, 1, 1)}, "pads with zeros"),
        ({"stride": (2, 2), "dilation": (2, 1), "padding": (1, 1, 2, 2)}, None),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], sentence: str | None) -> None:
    reason = epilogue.why_not(problem_with(**changes))
    assert reason is None if sentence is None else sentence in str(reason)


@pytest.mark.parametrize("name", ["magnitude", "angular"])
def test_a_function_without_expression_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = getattr(functions, f"{name}s")
    monkeypatch.setitem(known, "new", known["tanh" if name == "magnitude" else "sigmoid"])
    reason = epilogue.why_not(problem_with(**{name: "new"}))
    assert reason == "'new' is not written in terms of its primitives"
