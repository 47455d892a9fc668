"""The Triton backend without a GPU: every kernel interpreted, and every kernel compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import ANGULARS, CASES, WEIGHTED_MAGNITUDES, Case
from plan_a_model import implementations
from triton_checks.worker import Worker

from dcconv import backends, plan_a, plan_b_triton
from dcconv.problem import Operands, Problem
from dcconv.triton_impl import features

pytestmark = pytest.mark.skipif(features.missing() is not None, reason=str(features.missing()))

LARGE = (
    "filter-chunks",
    "channel-chunks",
    "chunks-groups3",
    "depthwise",
    "groups5-of-3",
    "groups5-of-4",
    "tiles",
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Worker]:
    worker = Worker("interpreted", {"TRITON_INTERPRET": "1"})
    yield worker
    worker.close()


def ids(value: Any) -> str:
    return value.id if isinstance(value, Case) else str(value)


def test_twins_are_those_of_the_specification(interpreter: Worker) -> None:
    found = interpreter.ask("lists")
    plain = [name for name, weighting in WEIGHTED_MAGNITUDES if weighting == "none"]
    assert found["magnitudes"] == [*plain, "tanh_product", "tanh_separate"]
    assert found["angulars"] == list(ANGULARS)
    assert found["twinless"] is None


def test_a_missing_twin_is_a_sentence(interpreter: Worker) -> None:
    assert interpreter.ask("absent_twin") == [
        "it has no Triton twin of the angular function 'power'",
        "it has no Triton twin of the magnitude 'tanh_separate'",
        None,
    ]


@pytest.mark.parametrize(("magnitude", "weighting"), WEIGHTED_MAGNITUDES)
def test_magnitude_twin(interpreter: Worker, magnitude: str, weighting: str) -> None:
    interpreter.ask("magnitude", name=magnitude, weighting=weighting)


def test_ties(interpreter: Worker) -> None:
    assert interpreter.ask("tie", name="ball") == [1.5, 0.75, -0.75]
    assert interpreter.ask("tie", name="segmented") == [3.0, 0.25, 1.25]


@pytest.mark.parametrize("angular", ANGULARS)
def test_angular_twin(interpreter: Worker, angular: str) -> None:
    interpreter.ask("angle", name=angular)


def test_functions_are_within_their_ulp(interpreter: Worker) -> None:
    """Six without fused multiply-add, which the interpreter lacks; GPUs have it."""
    for name, ulps in interpreter.ask("ulps").items():
        assert ulps <= 6, (name, ulps)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in CASES for dtype in ("float32", "float16")),
        *((case, "bfloat16") for case in CASES[::4]),
    ],
    ids=ids,
)
def test_geometry(interpreter: Worker, case: Case, dtype: str) -> None:
    """No pass has a product of matrices, which the interpreter gets wrong in bfloat16.

    bfloat16 differs from float16 in loads and stores alone: every fourth case.
    """
    interpreter.ask("geometry", case=case.id, dtype=dtype)


@pytest.mark.parametrize(("magnitude", "weighting"), WEIGHTED_MAGNITUDES)
def test_operator(interpreter: Worker, magnitude: str, weighting: str) -> None:
    interpreter.ask("operators", magnitude=magnitude, weighting=weighting)


@pytest.mark.parametrize("case", LARGE)
def test_large_layers(interpreter: Worker, case: str) -> None:
    interpreter.ask("large", case=case)


@pytest.mark.parametrize(
    "case",
    [
        "zeros-s2",
        "same-s2-multiplier2",
        "dilation2",
        "reflect",
        "replicate",
        "circular",
        "many-filters",
    ],
)
def test_depthwise(interpreter: Worker, case: str) -> None:
    interpreter.ask("depthwise", case=case)


@pytest.mark.parametrize("number", range(3))
def test_pointwise(interpreter: Worker, number: int) -> None:
    """float16, and bfloat16 with its products in float32: the interpreter multiplies its bits."""
    interpreter.ask("pointwise", number=number)


def test_what_one_pass_is_for() -> None:
    last = torch.zeros(2, 4, 5, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    weight, window = last[:, :, :1, :1].contiguous(), last[:, :, :3, :3]
    grouped = Problem(groups=4)

    def why_not(x: torch.Tensor, w: torch.Tensor, problem: Problem) -> str | None:
        return plan_b_triton.why_not(Operands(x, w, None, None, None, None), problem)

    assert why_not(last.float(), window[:, :1], grouped) is None
    assert why_not(last, weight, Problem()) is None
    for x, w, problem, sentence in (
        (last, window[:, :1], grouped._replace(magnitude="linear"), "norm-free operators are one"),
        (last, window[:, :2], Problem(groups=2), "groups of several channels have no kernel"),
        (last, window, Problem(), "windows of several pixels have no kernel"),
        (last, weight, Problem(padding=(0, 0, 1, 0)), "windows of several pixels have no kernel"),
        (last.float(), weight, Problem(), "float32 products are the library's"),
        (last.contiguous(), weight, Problem(), "1x1 layers have a kernel in channels_last order"),
    ):
        assert str(why_not(x, w, problem)).startswith(sentence)


def test_offsets_beyond_int32(interpreter: Worker) -> None:
    interpreter.ask("offsets_beyond_int32")


def test_opcheck_of_every_op(interpreter: Worker) -> None:
    assert len(interpreter.ask("opcheck")) == len(interpreter.ask("importable")) == 13


def test_schemas_are_those_of_the_compiled_library(interpreter: Worker) -> None:
    found = interpreter.ask("schemas")
    if found is None:
        pytest.skip("the compiled library is missing")
    for name, own, compiled in found:
        assert own == compiled, name


@pytest.mark.parametrize(
    "check",
    [
        "patch_norm",
        "repeats",
        "empty_batch",
        "hard_points",
        "compiles",
        "flops",
        "autocast",
        "second_derivatives",
    ],
)
def test_operator_as_a_whole(interpreter: Worker, check: str) -> None:
    interpreter.ask(check)


def test_interpreted_kernels_run_only_where_they_are_named(interpreter: Worker) -> None:
    found = interpreter.ask("choice")
    assert found["auto"] in ("cpu", "reference")
    assert found["float32"] is None
    assert found["float64"] == "its functions are float32 polynomials, got a float64 tensor"
    assert found["meta"] == "it runs on CPU tensors in Triton's interpreter, got a meta tensor"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(dtype: torch.dtype = torch.float32, index: int = 0) -> str | None:
        monkeypatch.setattr(backends, "_kernels", {})
        return backends._why_not_triton(backends.Call("cuda", dtype, False, index))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert sentence() == "this GPU is sm_75; the Triton kernels are for sm_80 and newer"
    assert sentence(index=3) == "this machine has no GPU 3"
    assert sentence(torch.float64) == "its functions are float32 polynomials, got a float64 tensor"
    monkeypatch.setattr(features, "OLDEST", (99, 1))
    assert str(sentence()).startswith("the kernels need Triton 99.1 or newer, found ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sentence() == "Triton is not installed"


def test_willing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for transformed, want in ((False, type(None)), (True, str)):
        call = backends.Call("cuda", torch.bfloat16, transformed)
        assert isinstance(backends._why_not_triton(call), want)
    assert all(hasattr(torch.ops.dcconv_triton, name) for name in implementations)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("triton")
    worker = Worker("compiled", {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)})
    yield worker
    worker.close()


KERNELS = (
    "column_sums_kernel",
    "depthwise_kernel",
    "epilogue_kernel",
    "filter_grad_kernel",
    "filter_norm_kernel",
    "grad_dot_kernel",
    "grad_input_kernel",
    "parameter_grads_kernel",
    "pixel_sumsq_kernel",
    "pointwise_kernel",
    "window_norm_kernel",
)

# Those that read and write activations: 16 bytes per access.
WIDE = (
    "depthwise_kernel",
    "epilogue_kernel",
    "grad_dot_kernel",
    "grad_input_kernel",
    "pixel_sumsq_kernel",
)


def test_every_kernel_is_launched_by_some_op(compiler: Worker) -> None:
    assert compiler.ask("names") == list(KERNELS)


Operator = tuple[str, str, str]


def built(
    compiler: Worker,
    kernel: str,
    target: str,
    dtype: str = "float16",
    last: bool = True,
    operator: Operator = ("tanh", "none", "cosine"),
    sums: int = plan_a.SUM_RHO,
) -> None:
    found = compiler.ask(
        "build",
        kernel=kernel,
        target=target,
        dtype=dtype,
        last=last,
        operator=operator,
        sums=sums,
    )
    assert found["kind"] == ("amdgcn" if target == "gfx942" else "ptx")
    assert found["stack"] == found["spills"] == 0, found
    assert found["products"] == (kernel == "pointwise_kernel")
    if kernel in WIDE and sums == plan_a.SUM_RHO:
        # The sums of pixels are one number per row of channels; waves of 64 share a tile that has
        # room for sums by four elements each.
        narrow = {"pixel_sumsq_kernel": 32}
        if target == "gfx942":
            narrow["grad_dot_kernel"] = 64
        assert found["load"] == 128 and found["store"] >= narrow.get(kernel, 128), found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles(compiler: Worker, kernel: str, target: str) -> None:
    built(compiler, kernel, target)


@pytest.mark.parametrize(
    ("kernel", "dtype", "last", "operator"),
    [
        ("epilogue_kernel", "float32", True, ("segmented", "linear", "sigmoid")),
        ("epilogue_kernel", "bfloat16", False, ("log", "none", "power")),
        ("grad_dot_kernel", "float32", False, ("mix", "linear", "linear")),
        ("grad_input_kernel", "bfloat16", False, ("tanh", "none", "cosine")),
        ("pixel_sumsq_kernel", "float32", False, ("tanh", "none", "cosine")),
    ],
)
def test_kernel_compiles_for_other_operands(
    compiler: Worker, kernel: str, dtype: str, last: bool, operator: Operator
) -> None:
    built(compiler, kernel, "sm_90", dtype, last, operator)


@pytest.mark.parametrize(
    ("dtype", "last"),
    [("float16", False), ("float32", True)],
    ids=["float16-contiguous", "float32-channels_last"],
)
def test_all_sums_of_the_largest_operator_stay_in_registers(
    compiler: Worker, dtype: str, last: bool
) -> None:
    operator = ("tanh", "separate", "sigmoid")
    built(compiler, "grad_dot_kernel", "sm_90", dtype, last, operator, sums=15)


def test_compilers_see_the_kernels(compiler: Worker) -> None:
    """Forward: squares, window norms, filter norms, epilogue; backward: five more."""
    assert compiler.ask("traced") == {
        "triton_kernel_wrapper_functional": 9,
        "aten.convolution.default": 1,
        "aten.convolution_backward.default": 1,
    }
