"""The compiled CPU kernels themselves: functions, instruction sets, threads, caches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from accuracy import (
    check,
    check_all,
    evaluate,
    random_cotangent,
    same_numbers,
    truth_and_peer,
)
from cases import ANGULARS, CASES, DTYPES, OPERATORS, WEIGHTED_MAGNITUDES, make_inputs

from dcconv import functional
from dcconv.operator.functions import angulars, magnitudes, weighted_magnitude
from dcconv.operator.numerics import ANGLE_DELTA

pytestmark = pytest.mark.backend("cpu")


def test_function_lists_agree_with_python() -> None:
    assert torch.ops.dcconv.magnitudes() == list(magnitudes)
    assert torch.ops.dcconv.angulars() == list(angulars)


def test_best_instruction_set_is_the_default() -> None:
    assert torch.ops.dcconv.cpu_isa() == torch.ops.dcconv.cpu_isas()[-1]


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"the instruction set must be one of .*, got 'sse9'"):
        torch.ops.dcconv.set_cpu_isa("sse9")


def test_instruction_set_follows_the_environment() -> None:
    if "baseline" not in torch.ops.dcconv.cpu_isas():
        pytest.skip("the library has code for this processor alone (DCCONV_BUILD=local)")
    code = "import torch, dcconv; print(torch.ops.dcconv.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DCCONV_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "baseline"


def grid(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points a, b, rho that avoid b = rho."""
    a = torch.logspace(-2, 1, 7, dtype=torch.float64)
    b = torch.logspace(-2, 2, 41, dtype=torch.float64)
    rho = torch.tensor([0.0123, 0.77, 3.3, 250.0], dtype=torch.float64)
    points = torch.cartesian_prod(a, b, rho).to(dtype)
    return tuple(column.contiguous() for column in points.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "weighting"), WEIGHTED_MAGNITUDES)
def test_magnitudes_and_derivatives(
    isa: str, name: str, weighting: str, dtype: torch.dtype
) -> None:
    a, b, rho = grid(dtype)
    got = torch.ops.dcconv.magnitude_grad(name, weighting, a, b, rho, 1.5, 0.25)

    def values(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (b, rho, a)]
        h = weighted_magnitude(name, weighting, leaves[2], leaves[0], leaves[1], 1.5, 0.25)
        h = h.expand(b.shape) + 0 * leaves[0]
        grads = torch.autograd.grad(h.sum(), leaves, materialize_grads=True, allow_unused=True)
        return [h.detach(), *grads]

    truth, peer = values(torch.float64), values(dtype)
    for label, g, t, p in zip(("h", "h_b", "h_rho", "h_a"), got, truth, peer, strict=True):
        check(f"{isa} {name} {weighting} {label}", g, t, p, dtype)


@pytest.mark.parametrize(("name", "weighting"), WEIGHTED_MAGNITUDES)
def test_magnitude_derivatives_are_those_of_the_value(isa: str, name: str, weighting: str) -> None:
    """Central differences of the compiled value itself, in float64."""
    points = grid(torch.float64)
    op = torch.ops.dcconv.magnitude_grad
    _, h_b, h_rho, h_a = op(name, weighting, *points, 1.5, 0.25)
    for index, derivative in ((1, h_b), (2, h_rho), (0, h_a)):
        step = points[index] * 1e-5
        moved = [list(points), list(points)]
        moved[0][index] = points[index] + step
        moved[1][index] = points[index] - step
        upper, lower = (op(name, weighting, *p, 1.5, 0.25)[0] for p in moved)
        numeric = (upper - lower) / (2 * step)
        # Differences of float64 values: eps / step, and the cubic term of the step.
        scale = derivative.abs() + upper.abs() / points[index]
        assert ((numeric - derivative).abs() <= 1e-8 * scale).all(), f"{isa} argument {index}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ANGULARS)
def test_angles_and_derivatives(isa: str, name: str, dtype: torch.dtype) -> None:
    c = torch.cat((torch.linspace(-1, 1, 401), torch.logspace(-6, -2, 9)), 0).to(dtype)
    k = torch.tensor([0.05, 0.3, 2.0]).to(dtype)
    c, k = (t.contiguous() for t in torch.cartesian_prod(c, k).T)
    delta = ANGLE_DELTA[dtype]
    got = torch.ops.dcconv.angular_grad(name, c, k, 2.5, delta)

    def values(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (c, k)]
        g = angulars[name].value(leaves[0], leaves[1], 2.5, delta) + 0 * leaves[1]
        grads = torch.autograd.grad(g.sum(), leaves)
        return [g.detach(), *grads]

    truth, peer = values(torch.float64), values(dtype)
    for label, g, t, p in zip(("g", "g_c", "g_k"), got, truth, peer, strict=False):
        check(f"{isa} {name} {label}", g, t, p, dtype)
    if angulars[name].invertible:
        check(f"{isa} {name} inverse", got[3], c.double(), c, dtype)


@pytest.mark.parametrize("name", ANGULARS)
def test_angular_derivatives_are_those_of_the_value(isa: str, name: str) -> None:
    c = torch.linspace(-0.98, 0.98, 98, dtype=torch.float64)
    k = torch.full_like(c, 0.4)
    op = torch.ops.dcconv.angular_grad
    _, g_c, g_k, _ = op(name, c, k, 2.5, 1e-12)
    step = 1e-5
    numeric_c = (op(name, c + step, k, 2.5, 1e-12)[0] - op(name, c - step, k, 2.5, 1e-12)[0]) / (
        2 * step
    )
    numeric_k = (op(name, c, k + step, 2.5, 1e-12)[0] - op(name, c, k - step, 2.5, 1e-12)[0]) / (
        2 * step
    )
    assert ((numeric_c - g_c).abs() <= 1e-6 * (1 + g_c.abs())).all()
    assert ((numeric_k - g_k).abs() <= 1e-8 * (1 + g_k.abs())).all()


def test_functions_are_within_four_ulp(isa: str) -> None:
    """tanh, log(1 + x) and asin in float32 against float64, over their range."""

    def ulps(got: torch.Tensor, truth: torch.Tensor) -> float:
        rounded = truth.float()
        spacing = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()
        return float(((got.double() - truth).abs() / spacing.double()).max())

    one = torch.ones(200_000)
    z = torch.logspace(-6, 1.5, 200_000)
    h = torch.ops.dcconv.magnitude_grad
    assert ulps(h("tanh", "none", one, z, one, 1.0, 0.5)[0], z.double().tanh()) <= 4
    assert ulps(h("log", "none", one, z, one, 1.0, 0.5)[0], z.double().log1p()) <= 4
    c = torch.linspace(-1, 1, 200_000)
    g = torch.ops.dcconv.angular_grad("linear", c, one, 2.0, 1e-6)[0]
    assert ulps(g, c.double().asin() * (2 / torch.pi)) <= 4
    size = c.abs()
    for power in (1.0, 1.5, 2.0, 3.0):
        g = torch.ops.dcconv.angular_grad("power", size, one, power, 1e-6)[0]
        normal = size**power > 1e-30
        assert ulps(g[normal], (size.double() ** power)[normal]) <= 4


def test_storage_rounds_to_nearest(isa: str) -> None:
    """A sphere of aligned unit vectors returns alpha: its rounding to the storage dtype shows."""
    generator = torch.Generator().manual_seed(0)
    mantissas = 1 + torch.rand(60, generator=generator, dtype=torch.float64)
    for dtype, exponents in (
        (torch.bfloat16, (-100, -3, 0, 90)),
        (torch.float16, (-18, -3, 0, 14)),
    ):
        one = torch.ones(1, 1, 1, 1, dtype=dtype)
        for mantissa in mantissas.tolist():
            for exponent in exponents:
                alpha = mantissa * 2.0**exponent
                y = functional.decoupled_conv2d(
                    one, -one, magnitude="sphere", alpha=alpha, eps=1e-12
                )
                assert float(y) == float(torch.tensor(-alpha).to(dtype)), alpha


def test_float16_ties_and_limits(isa: str) -> None:
    """Norm-free float16 is a float convolution rounded once: sums of two numbers, ties included."""
    bits = torch.arange(-32768, 32768, 37, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    other = torch.roll(values, 11)
    half_ulp = torch.where(values.abs() >= 2.0**-13, values.abs() * 2.0**-11, 0 * values)
    for second in (other, half_ulp, torch.full_like(values, float("inf"))):
        x = torch.stack((values, second)).reshape(1, 2, 1, -1)
        y = functional.decoupled_conv2d(
            x,
            torch.ones(1, 2, 1, 1, dtype=torch.float16),
            magnitude="linear",
            weighting="linear",
        )
        want = (values.float() + second.float()).half().reshape(y.shape)
        assert same_numbers(y, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_accurate(isa: str, dtype: torch.dtype) -> None:
    for i, case in enumerate(CASES):
        magnitude, weighting, angular = OPERATORS[(11 * i) % len(OPERATORS)]
        layout = ("contiguous", "channels_last")[i % 2]
        inputs = make_inputs(
            case, dtype, layout, magnitude=magnitude, weighting=weighting, angular=angular
        )
        cotangent = random_cotangent(inputs)
        truth, peer = truth_and_peer(inputs, cotangent)
        got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu")
        check_all(f"{isa} {case.id} {magnitude} {weighting} {angular}", got, truth, peer, dtype)


def big_inputs(layout: str, dtype: torch.dtype, magnitude: str = "tanh") -> object:
    """Several tasks in every pass: more than kTask elements and more than kTile positions."""
    case = type(CASES[0])("big", 3, 20, 41, 37, 24, (3, 3), padding=1, groups=2)
    return make_inputs(case, dtype, layout, magnitude=magnitude, angular="sigmoid")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_kernels_give_the_same_bits_at_any_number_of_threads(
    dtype: torch.dtype, layout: str
) -> None:
    """Library results are computed once and fed to all: only our own kernels are compared."""
    inputs = big_inputs(layout, dtype)
    tensors, options = inputs
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = tensors["x"].detach().requires_grad_()
            b = functional.patch_norm(x, 3, padding=1, groups=2, backend="cpu")
            b.backward(torch.linspace(-1, 1, b.numel(), dtype=b.dtype).reshape(b.shape))
            # One unit tap per filter makes u a copy at any number of threads: y and the sums of
            # backward are ours. The library's own gradients of x and weight are left out.
            weight = torch.zeros_like(tensors["weight"])
            for o in range(weight.shape[0]):
                weight[o, o % weight.shape[1], 1, 1] = 1
            leaves = {
                "x": tensors["x"].detach().requires_grad_(),
                "radius": tensors["radius"].detach().requires_grad_(),
                "k": tensors["k"].detach().requires_grad_(),
            }
            y = functional.decoupled_conv2d(weight=weight, **leaves, **options, backend="cpu")
            grads = torch.autograd.grad(y, list(leaves.values()), y.detach())
            results.append([b.detach(), x.grad, y.detach(), *grads[1:]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_whole_operator_repeats_bit_for_bit(layout: str) -> None:
    for dtype in DTYPES:
        inputs = big_inputs(layout, dtype)
        cotangent = random_cotangent(inputs)
        runs = [evaluate(functional.decoupled_conv2d, inputs, cotangent) for _ in range(3)]
        for name in runs[0]:
            assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:]), name


def test_negative_curvature_gives_what_the_formula_gives(isa: str) -> None:
    c = torch.linspace(-0.9, 0.9, 50, dtype=torch.float64)
    positive = torch.ops.dcconv.angular_grad("sigmoid", c, torch.full_like(c, 0.3), 2.0, 1e-12)
    negative = torch.ops.dcconv.angular_grad("sigmoid", c, torch.full_like(c, -0.3), 2.0, 1e-12)
    for one, two, sign in zip(positive[:3], negative[:3], (1, 1, -1), strict=True):
        check(f"{isa} sigmoid", two, sign * one, one, torch.float64)


@pytest.mark.parametrize("magnitude", ["tanh", "linear"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_chunks_do_not_change_the_result(images: int, magnitude: str) -> None:
    """Whatever number of images goes through at a time, the accuracy rule holds."""
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            for norm in ("batch", "given"):
                for geometry in ("groups3-odd", "reflect-same-s2", "1x1"):
                    case = next(case for case in CASES if case.id == geometry)
                    case = type(case)(**{**case.__dict__, "n": 5})
                    inputs = make_inputs(
                        case, dtype, layout, magnitude=magnitude, norm=norm, bias=layout[0] == "c"
                    )
                    cotangent = random_cotangent(inputs)
                    truth, peer = truth_and_peer(inputs, cotangent)
                    torch.ops.dcconv.set_cpu_chunk(images)
                    try:
                        got = evaluate(functional.decoupled_conv2d, inputs, cotangent)
                    finally:
                        torch.ops.dcconv.set_cpu_chunk(0)
                    check_all(f"{images} {dtype} {layout} {norm}", got, truth, peer, dtype)
