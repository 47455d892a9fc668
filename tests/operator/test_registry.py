"""Functions that are registered in Python alone: what runs them, and what refuses them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import check_equal
from new_functions import register, registered
from paths import ROOT
from torch import Tensor

import dcconv
from dcconv import backends, native, warn
from dcconv.call import refusals
from dcconv.functional import decoupled_conv2d
from dcconv.operator import functions
from dcconv.triton import environment

CPU = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))


@pytest.fixture(autouse=True)
def two_more(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both functions, and no warning seen yet, while a test runs."""
    monkeypatch.setattr(warn, "_said", set())
    with registered():
        yield


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.rand(4, dtype=torch.float64) + 0.5


def by_hand(x: Tensor, weight: Tensor, rho: Tensor, magnitude: str, angular: str) -> Tensor:
    a = (weight.square().sum(dim=(1, 2, 3)) + 1e-4).sqrt().view(-1, 1, 1)
    ones = torch.ones(1, 3, 3, 3, dtype=x.dtype)
    b = (torch.nn.functional.conv2d(x.square(), ones) + 1e-4).sqrt()
    c = torch.nn.functional.conv2d(x, weight) / (a * b)
    r = rho.view(-1, 1, 1)
    h = b / (b + r) if magnitude == "fraction" else torch.tanh(b / r)
    return h * ((c + c**3) / 2 if angular == "cubic" else c)


OPERATORS = [("fraction", "cosine"), ("tanh", "cubic"), ("fraction", "cubic")]


def sentence(magnitude: str, angular: str) -> str:
    kind, name = ("magnitude", magnitude) if magnitude != "tanh" else ("angular function", angular)
    return f"the compiled library has no {kind} '{name}'"


@pytest.mark.parametrize(("magnitude", "angular"), OPERATORS)
def test_it_runs_on_the_reference(magnitude: str, angular: str) -> None:
    x, weight, rho = tensors()
    said = re.escape(native.missing or sentence(magnitude, angular))
    call: dict[str, Any] = {"magnitude": magnitude, "angular": angular, "radius": rho}
    with (
        backends.use_backend("auto"),
        pytest.warns(RuntimeWarning, match=f"reference runs on cpu tensors .cpu: {said}"),
    ):
        y = decoupled_conv2d(x, weight, **call)
    check_equal("y", y.detach(), by_hand(x, weight, rho, magnitude, angular).detach())
    grads = torch.autograd.grad(y.square().sum(), (x, weight))
    wanted = torch.autograd.grad(
        by_hand(x, weight, rho, magnitude, angular).square().sum(), (x, weight)
    )
    for name, got, want in zip(("x", "weight"), grads, wanted, strict=True):
        check_equal(f"grad_{name}", got, want)


@CPU
@pytest.mark.parametrize(("magnitude", "angular"), OPERATORS)
def test_the_compiled_backend_refuses_it(magnitude: str, angular: str) -> None:
    x, weight, rho = tensors()
    said = sentence(magnitude, angular)
    call: dict[str, Any] = {"magnitude": magnitude, "angular": angular, "radius": rho}
    full = f"dcconv: backend 'cpu' cannot run this call: {said}"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(full)}$"):
        decoupled_conv2d(x, weight, **call, backend="cpu")
    with (
        backends.use_backend("cpu"),
        pytest.raises(NotImplementedError, match=f"^{re.escape(full)}$"),
    ):
        dcconv.DecoupledConv2d(3, 4, 3, magnitude=magnitude, angular=angular)(x.detach().float())
    assert backends.why_not("cpu", x, magnitude, angular) == said
    assert backends.why_not("cpu", x) is None
    with backends.use_backend("reference"):
        lines = backends.report(x, weight, **call).splitlines()
    assert f"  {'cpu':<10}{said}" in lines
    # Functions that are known, and the patch norm, which has none, go on.
    y = decoupled_conv2d(x, weight, radius=rho, backend="cpu")
    assert y.isfinite().all()
    assert dcconv.patch_norm(x, 3, backend="cpu").isfinite().all()


@pytest.mark.parametrize(("magnitude", "angular"), OPERATORS)
def test_the_cuda_backends_would_refuse_it(
    magnitude: str, angular: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of a GPU that is not there."""
    monkeypatch.setattr(native, "cuda_missing", lambda: None)
    monkeypatch.setattr(refusals, "_why_not_gpu", lambda index: None)
    monkeypatch.setattr(refusals, "_why_not_kernels", lambda index: None)
    asked = backends.Call("cuda", torch.float32, False, 0, (magnitude, angular, "none"))
    cuda, triton, *_ = backends._BACKENDS
    assert cuda.why_not(asked) == sentence(magnitude, angular)
    assert cuda.why_not(asked._replace(functions=None)) is None
    if environment.missing() is not None or environment.INTERPRETED:
        pytest.skip(environment.missing() or "Triton interprets")
    twin = sentence(magnitude, angular).replace(
        "the compiled library has no", "no Triton twin of the"
    )
    assert triton.why_not(asked) == f"it has {twin}"
    assert triton.why_not(asked._replace(functions=("tanh", "cosine", "none"))) is None


def test_it_compiles() -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3, magnitude="fraction", angular="cubic")
    x = torch.randn(2, 3, 6, 5)
    with backends.use_backend("auto"):
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    with backends.use_backend("reference"):
        assert torch.equal(got, layer(x))


def test_a_name_is_taken_once() -> None:
    """The kernels would go on computing the function that had the name before."""

    def tanh(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
        return b

    def power(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
        return c

    before = functions.magnitudes["tanh"], functions.angulars["power"]
    with pytest.raises(ValueError, match=r"^dcconv: magnitude must be a new name, got 'tanh'$"):
        functions.magnitude("b")(tanh)
    with pytest.raises(ValueError, match=r"^dcconv: angular must be a new name, got 'power'$"):
        functions.angular("c")(power)
    assert (functions.magnitudes["tanh"], functions.angulars["power"]) == before
    # The same function from a cell or module that ran again.
    register()


def test_a_function_that_is_defined_again_or_taken_back_counts() -> None:
    """What is kept of checked calls ends with the functions that it was said of."""
    x, weight, rho = tensors()

    def define(with_radius: bool) -> None:
        source = "b / rho" if with_radius else "b"
        scope = {"functions": functions, "__name__": "cell"}
        code = f"@functions.magnitude('{source}', rho={with_radius})\n"
        exec(f"{code}def mine(b, rho, alpha, beta): return alpha * {source}", scope)  # noqa: S102

    call: dict[str, Any] = {"magnitude": "mine", "radius": rho, "backend": "reference"}
    layer_of = partial(dcconv.DecoupledConv2d, 3, 4, 3, magnitude="mine", backend="reference")
    try:
        define(False)
        layer = layer_of()
        first = [decoupled_conv2d(x, weight, **call) for _ in range(2)][1]
        layer(x.detach().float())
        define(True)
        for _ in range(2):
            scaled = decoupled_conv2d(x, weight, **call) * rho.view(-1, 1, 1)
            check_equal("y", scaled.detach(), first.detach())
        sizes = [p.shape for p in layer_of().parameters()]
        assert torch.Size([4]) in sizes
    finally:
        del functions.magnitudes["mine"]
    said = r"^dcconv: magnitude must be one of .*, got 'mine'$"
    with pytest.raises(ValueError, match=said):
        decoupled_conv2d(x, weight, **call)
    with pytest.raises(ValueError, match=said):
        layer(x.detach().float())


PROBE = """
import sys, warnings
import pytest
sys.path.insert(0, "tests/support")
import new_functions
new_functions.register()
import dcconv.operator.functions as functions
assert list(functions.magnitudes)[-1] == "fraction" and list(functions.angulars)[-1] == "cubic"
status = pytest.main([
    "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore", *sys.argv[1:]
])
sys.exit(int(status))
"""

# What reads the lists: tables of cases and operators, sentences, expressions, benches, networks.
FOLLOWING = (
    "tests/operator/test_functions.py",
    "tests/operator/test_errors.py::test_wrong_call_raises_its_sentence",
    "tests/cudnn/test_expressions.py",
    "tests/bench/test_bench_functions.py::test_every_function_is_measured",
    "tests/bench/test_bench_functions.py::test_exact_formulas_are_those_of_the_specification",
    "tests/bench/test_bench_ops.py::test_formula_is_every_operator",
    "tests/train/test_digits.py::test_every_operator_name_builds_its_network",
    "tests/layer/test_modules.py::test_only_used_parameters_exist",
    "tests/call/test_ops.py::test_gradcheck",
)


def test_tests_follow_the_lists() -> None:
    """The suite's tables hold for a function more of each kind, on the reference."""
    environment = os.environ | {"DCCONV_BACKEND": "reference", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROBE),
            *FOLLOWING,
            *("-k", "fraction or cubic or lists or every or used or magnitude or angular or steps"),
            *("--backend", "reference"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"^(\d+) passed.* in ", done.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) > 100, done.stdout[-1000:]
