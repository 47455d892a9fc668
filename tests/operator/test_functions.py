"""The Python functions: registry, values, derivatives, ties, ends of the range, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import check, check_equal
from calls import problem_with
from cases import ANGULARS, ANGULARS_OF_PAPER, MAGNITUDES_OF_PAPER, WEIGHTED_MAGNITUDES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dcconv.call.saved import kept
from dcconv.operator.functions import (
    angulars,
    capped_asin,
    magnitudes,
    weighted_magnitude,
    weightings,
)
from dcconv.operator.numerics import ANGLE_DELTA, RHO_FLOOR

ALPHA, BETA, RHO, A, K, POWER = 1.3, 0.4, 1.7, 0.8, 0.35, 1.6
DELTA = ANGLE_DELTA[torch.float64]

weighted_ids = pytest.mark.parametrize(
    ("name", "weighting"), WEIGHTED_MAGNITUDES, ids=map("-".join, WEIGHTED_MAGNITUDES)
)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def magnitude_of(name: str, weighting: str = "none") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return h as a function of a, b and rho."""

    def call(a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
        return weighted_magnitude(name, weighting, a, b, rho, ALPHA, BETA)

    return call


def angular_of(name: str, delta: float = DELTA) -> Callable[[Tensor, Tensor], Tensor]:
    """Return g as a function of c and k."""

    def call(c: Tensor, k: Tensor) -> Tensor:
        return angulars[name].value(c, k, POWER, delta)

    return call


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at).sum(), at)
    return gradient


def test_registry_lists_the_whole_family() -> None:
    valid = {
        (name, weighting.name)
        for name in magnitudes
        for weighting in weightings.values()
        if weighting.only_with in (None, name)
    }
    assert set(WEIGHTED_MAGNITUDES) == valid
    uses_rho = {name: record.uses_rho for name, record in magnitudes.items()}
    uses_k = {name: record.uses_k for name, record in angulars.items()}
    assert MAGNITUDES_OF_PAPER.items() <= uses_rho.items()
    assert ANGULARS_OF_PAPER.items() <= uses_k.items()
    of_paper = {pair for pair in valid if pair[0] in MAGNITUDES_OF_PAPER}
    assert len(of_paper) == 16
    invertible = {name for name in ANGULARS_OF_PAPER if angulars[name].invertible}
    assert invertible == {"linear", "cosine", "square_cosine"}
    entries = [*magnitudes.values(), *angulars.values(), *weightings.values()]
    assert all(entry.formula for entry in entries)
    assert len({entry.formula for entry in entries}) == len(entries)


def test_constants_are_those_of_the_specification() -> None:
    assert RHO_FLOOR == 1e-12
    assert {
        torch.float64: 1e-12,
        torch.float32: 1e-6,
        torch.float16: 1e-3,
        torch.bfloat16: 1e-3,
    } == ANGLE_DELTA


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("sphere", 1.3, 1.3),
        ("ball", 1.3 * 0.9 / 1.7, 1.3),
        ("tanh", 1.3 * math.tanh(0.9 / 1.7), 1.3 * math.tanh(2.5 / 1.7)),
        ("linear", 1.3 * 0.9, 1.3 * 2.5),
        ("segmented", 1.3 * 0.9, 0.4 * 2.5 + 0.9 * 1.7),
        ("log", 1.3 * math.log(1.9), 1.3 * math.log(3.5)),
        ("mix", 1.3 * 0.9 + 0.4 * math.log(1.9), 1.3 * 2.5 + 0.4 * math.log(3.5)),
    ],
)
def test_magnitude_values(name: str, inside: float, outside: float) -> None:
    got = magnitudes[name].value(column(0.9, 2.5), column(RHO), ALPHA, BETA)
    check_equal(name, got, column(inside, outside))


def sech2(z: float) -> float:
    return 1 - math.tanh(z) ** 2


@pytest.mark.parametrize(
    ("name", "by_b", "by_rho"),
    [
        ("sphere", lambda b: 0.0, None),
        (
            "ball",
            lambda b: ALPHA / RHO if b < RHO else 0.0,
            lambda b: -ALPHA * b / RHO**2 if b < RHO else 0.0,
        ),
        (
            "tanh",
            lambda b: ALPHA / RHO * sech2(b / RHO),
            lambda b: -ALPHA * b / RHO**2 * sech2(b / RHO),
        ),
        ("linear", lambda b: ALPHA, None),
        (
            "segmented",
            lambda b: ALPHA if b < RHO else BETA,
            lambda b: 0.0 if b < RHO else ALPHA - BETA,
        ),
        ("log", lambda b: ALPHA / (1 + b), None),
        ("mix", lambda b: ALPHA + BETA / (1 + b), None),
    ],
)
def test_magnitude_derivatives_are_the_formulas_of_the_paper(
    name: str, by_b: Callable[[float], float], by_rho: Callable[[float], float] | None
) -> None:
    places = (0.01, 0.5, 1.2, 1.69, 1.71, 2.5, 6.0)
    b, rho = column(*places), torch.full((len(places),), RHO, dtype=torch.float64)
    call = magnitude_of(name)
    got = slope(lambda t: call(column(A), t, rho) + 0.0 * t, b)
    check_equal("dh/db", got, column(*map(by_b, places)))
    got = slope(lambda t: call(column(A), b, t) + 0.0 * t, rho)
    check_equal("dh/drho", got, column(*(by_rho(v) if by_rho else 0.0 for v in places)))


@pytest.mark.parametrize(
    ("weighting", "by_a"),
    [
        ("linear", lambda b: ALPHA * math.tanh(b / RHO)),
        ("product", lambda b: ALPHA * sech2(A * b / RHO) * b / RHO),
        ("separate", lambda b: ALPHA * math.tanh(b / RHO) * sech2(A / RHO) / RHO),
    ],
)
def test_weighting_derivatives_are_the_formulas_of_the_paper(
    weighting: str, by_a: Callable[[float], float]
) -> None:
    places = (0.01, 0.5, 1.2, 2.5, 6.0)
    call = magnitude_of("tanh", weighting)
    a = torch.full((len(places),), A, dtype=torch.float64)
    got = slope(lambda t: call(t, column(*places), column(RHO)), a)
    check_equal("dh/da", got, column(*map(by_a, places)))


@weighted_ids
def test_magnitude_derivatives_match_finite_differences(name: str, weighting: str) -> None:
    a = column(0.3, 0.8, 1.5).reshape(3, 1).requires_grad_()
    b = column(0.01, 0.5, 1.2, 2.5, 6.0).requires_grad_()
    rho = column(0.7, 1.7, 4.0).reshape(3, 1).requires_grad_()

    def call(a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
        # Times a b rho, because gradcheck refuses functions that do not use an argument.
        return a * b * rho * magnitude_of(name, weighting)(a, b, rho)

    assert gradcheck(call, (a, b, rho))
    assert gradgradcheck(call, (a, b, rho))


@pytest.mark.parametrize("name", ANGULARS)
def test_angular_derivatives_match_finite_differences(name: str) -> None:
    c = column(-0.99, -0.9, -0.4, -0.01, 0.02, 0.3, 0.75, 0.99).requires_grad_()
    k = column(0.05, 0.35, 1.0, 20.0).reshape(4, 1).requires_grad_()
    assert gradcheck(angular_of(name), (c, k))


@pytest.mark.parametrize("name", ANGULARS)
def test_angular_second_derivatives_match_finite_differences(name: str) -> None:
    c = column(-0.9, -0.4, 0.3, 0.75).requires_grad_()
    k = column(0.35, 1.0).reshape(2, 1).requires_grad_()
    assert gradgradcheck(angular_of(name), (c, k))


def test_sigmoid_derivative_by_k_is_the_formula_of_the_paper() -> None:
    k = column(0.3).requires_grad_()
    c = 0.6
    (got,) = torch.autograd.grad(angular_of("sigmoid")(column(c), k), k)
    t, q = math.tanh(math.pi / 1.2), math.tanh(math.asin(c) / 0.6)
    phi, g = math.asin(c), q / t
    want = (-phi * (1 - q * q) / 0.18 + g * math.pi * (1 - t * t) / 0.36) / t
    check_equal("dg/dk", got, column(want))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("linear", lambda c: 1 - 2 * math.acos(c) / math.pi),
        ("cosine", lambda c: c),
        ("square_cosine", lambda c: math.copysign(c * c, c)),
        ("power", lambda c: math.copysign(abs(c) ** POWER, c)),
        (
            "sigmoid",
            lambda c: (
                (1 + math.exp(-math.pi / (2 * K)))
                / (1 - math.exp(-math.pi / (2 * K)))
                * (1 - math.exp(math.acos(c) / K - math.pi / (2 * K)))
                / (1 + math.exp(math.acos(c) / K - math.pi / (2 * K)))
            ),
        ),
    ],
)
def test_angular_values(name: str, want: Callable[[float], float]) -> None:
    places = (-1.0, -0.99, -0.3, -1e-3, 1e-3, 0.5, 0.9, 1.0)
    got = angular_of(name)(column(*places), column(K))
    check_equal(name, got, column(*map(want, places)))


@pytest.mark.parametrize("name", ANGULARS)
def test_angular_functions_are_odd_and_increase_from_minus_one_to_one(name: str) -> None:
    c = torch.arange(-100, 101, dtype=torch.float64) / 100
    g = angular_of(name)(c, column(K))
    check_equal("odd", -g.flip(0), g)
    assert g[0] == -1.0
    assert g[-1] == 1.0
    assert g[100] == 0.0
    assert bool((g.diff() > 0).all())


def test_ball_counts_a_tie_as_inside() -> None:
    tie = column(RHO)
    assert float(magnitude_of("ball")(tie, tie, tie)) == ALPHA
    check_equal(
        "db", slope(lambda b: magnitude_of("ball")(tie, b, tie), tie), tie * 0 + ALPHA / RHO
    )
    want = tie * 0 - ALPHA / RHO
    check_equal("drho", slope(lambda rho: magnitude_of("ball")(tie, tie, rho), tie), want)


def test_segmented_counts_a_tie_as_outside() -> None:
    tie = column(RHO)
    check_equal("value", magnitude_of("segmented")(tie, tie, tie), column(ALPHA * RHO))
    got = slope(lambda b: magnitude_of("segmented")(tie, b, tie), tie)
    check_equal("db", got, column(BETA))
    got = slope(lambda rho: magnitude_of("segmented")(tie, tie, rho), tie)
    check_equal("drho", got, column(ALPHA - BETA))


def test_cosines_have_no_slope_jump_at_zero() -> None:
    zero = column(0.0)
    for name, want in (("square_cosine", 0.0), ("power", 0.0), ("cosine", 1.0)):
        assert (
            float(slope(lambda c, name=name: angular_of(name)(c, column(K)) + 0 * c, zero)) == want
        )
    one = slope(lambda c: angulars["power"].value(c, None, 1.0, DELTA), zero)
    assert float(one) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_asin_beyond_its_range_is_clamped_and_its_slope_capped(
    sign: float, dtype: torch.dtype
) -> None:
    delta = ANGLE_DELTA[dtype]
    c = sign * torch.tensor([1.0, 1.0 + 1e-7, 1.0007, 1.5], dtype=dtype)
    value = capped_asin(c, delta)
    check_equal("value", value, torch.full_like(c, sign * math.pi / 2))
    check_equal("slope", slope(lambda t: capped_asin(t, delta), c), torch.full_like(c, delta**-0.5))


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_angular_values_and_slopes_beyond_the_range(name: str) -> None:
    c = column(-1.5, -1.0007, -1.0, 1.0, 1.0007, 1.5)
    delta = 1e-3
    g = angular_of(name, delta)
    check_equal("value", g(c, column(K)), c.sign())
    ends = 2 / math.pi
    if name == "sigmoid":
        t = math.tanh(math.pi / (4 * K))
        ends = (1 - t * t) / (2 * K * t)
    check_equal("slope", slope(lambda t: g(t, column(K)), c), torch.full_like(c, ends / delta**0.5))


def test_asin_slope_is_exact_up_to_the_cap() -> None:
    for delta in (1e-3, 1e-6, 1e-12):
        bound = math.sqrt(1 - delta)
        c = torch.cat(
            (torch.linspace(-0.999, 0.999, 101, dtype=torch.float64), column(bound * 0.9999))
        )
        c = c[(1 - c) * (1 + c) > delta]
        want = 1 / torch.sqrt((1 - c) * (1 + c))
        check_equal("slope", slope(lambda t, delta=delta: capped_asin(t, delta), c), want)


def test_asin_slope_keeps_float32_accuracy() -> None:
    """1 - c * c cancels near 1, and a large slope added and taken away again loses digits."""
    delta = ANGLE_DELTA[torch.float32]
    for edge in (0.5, 0.9, 0.99, 0.999):
        c = torch.linspace(-edge, edge, 1001, dtype=torch.float32)
        truth = 1 / torch.sqrt((1 - c.double()) * (1 + c.double()))
        check("slope", slope(lambda t: capped_asin(t, delta), c), truth, truth, torch.float32)
        check("value", capped_asin(c, delta), c.double().asin(), c.asin(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_asin_slope_at_the_rounded_bound_of_its_cap(dtype: torch.dtype, sign: float) -> None:
    """Clamp has no slope there, and neither branch may be lost between two comparisons."""
    delta = ANGLE_DELTA[dtype]
    bound = torch.tensor([sign * (1 - delta) ** 0.5], dtype=dtype)
    nearby = torch.cat((bound, bound.nextafter(0 * bound), bound.nextafter(2 * bound)))
    slopes = slope(lambda c: capped_asin(c, delta), nearby).double()
    wanted = ((1 - nearby.double()) * (1 + nearby.double())).clamp(min=delta).rsqrt()
    assert bool(((slopes / wanted - 1).abs() < 1e-3).all()), (slopes, wanted)


def test_asin_has_every_further_derivative() -> None:
    c = column(-1.0, -0.5, 0.0, 0.8, 1.0, 1.2).requires_grad_()
    (first,) = torch.autograd.grad(capped_asin(c, DELTA).sum(), c, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), c, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), c)
    inside = column(-0.5, 0.0, 0.8)
    want = inside / (1 - inside.square()) ** 1.5
    check_equal("second", second[[1, 2, 3]].detach(), want)
    want = (1 + 2 * inside.square()) / (1 - inside.square()) ** 2.5
    check_equal("third", third[[1, 2, 3]], want)
    assert bool(torch.stack((first, second, third)).isfinite().all())
    assert second[[0, 4, 5]].tolist() == [0.0, 0.0, 0.0]


def test_sigmoid_is_stable_for_small_and_large_k() -> None:
    c = torch.linspace(-1, 1, 41, dtype=torch.float32)
    for k in (1e-3, 0.01, 0.05, 1e4):
        g = angulars["sigmoid"].value(c, torch.tensor(k), 2.0, 1e-6)
        assert bool(g.isfinite().all())
        assert float(g.abs().max()) == 1.0
    linear = angulars["linear"].value(c, None, 2.0, 1e-6)
    check_equal("k to infinity", g, linear)


@pytest.mark.parametrize("keep", ["auto", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_backward_keeps_what_the_design_says(keep: str, dtype: torch.dtype) -> None:
    for magnitude, weighting in WEIGHTED_MAGNITUDES:
        for angular in ANGULARS:
            problem = problem_with(magnitude=magnitude, angular=angular, weighting=weighting)
            for bias in (False, True):
                exact = angulars[angular].invertible and not bias
                if angular == "square_cosine" and dtype == torch.float16:
                    exact = False
                want = "output" if exact and keep == "auto" else "dot"
                # alpha b c is alpha u / a: the patch norm cancels, and nothing else is needed.
                if (magnitude, angular) == ("linear", "cosine"):
                    want = "nothing"
                assert kept(problem, dtype, bias, keep) == want


@weighted_ids
def test_magnitudes_propagate_nan(name: str, weighting: str) -> None:
    nan, fine = column(math.nan), column(RHO)
    h = magnitude_of(name, weighting)
    if name != "sphere":
        assert bool(h(fine, nan, fine).isnan())
    if magnitudes[name].uses_rho:
        assert bool(h(fine, fine, nan).isnan())
    if weighting != "none":
        assert bool(h(nan, fine, fine).isnan())


@pytest.mark.parametrize("name", ANGULARS)
def test_angular_functions_propagate_nan(name: str) -> None:
    nan, fine = column(math.nan), column(0.5)
    assert bool(angular_of(name)(nan, fine).isnan())
    assert bool(slope(lambda c: angular_of(name)(c, fine) * c, nan).isnan())
    if angulars[name].uses_k:
        assert bool(angular_of(name)(fine, nan).isnan())


def test_weighting_without_a_formula_is_refused() -> None:
    one = column(1.0)
    with pytest.raises(AssertionError, match="half"):
        magnitude_of("tanh", "half")(one, one, one)
