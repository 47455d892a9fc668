"""The Triton backend without a GPU: every kernel interpreted, and every kernel compiled."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import affine
import pytest
import torch
from calls import problem_with
from cases import (
    ANGULARS,
    ANGULARS_OF_PAPER,
    CASES,
    MAGNITUDES_OF_PAPER,
    OPERATORS,
    WEIGHTED_MAGNITUDES,
    Case,
)
from library_model import implementations
from triton_checks.worker import Worker

from dcconv import backends, tracing
from dcconv.call import refusals
from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.records import Operands, Problem
from dcconv.passes import records
from dcconv.passes.records import DIRECTIONS, OWN_RULE
from dcconv.triton import environment
from dcconv.triton import fused as triton_fused
from dcconv.triton.tiles import TILES, Gpu, Product, own_rule, worthwhile

pytestmark = pytest.mark.skipif(
    environment.missing() is not None, reason=str(environment.missing())
)

LARGE = (
    "filter-chunks",
    "channel-chunks",
    "chunks-groups3",
    "depthwise",
    "groups5-of-3",
    "groups5-of-4",
    "tiles",
)


PRODUCTS = (
    "pixels",
    "pixels-s2",
    "pixels-p1",
    "pixels-groups2",
    "3x3",
    "3x3-groups2",
    "3x2-s2-dilation2",
    "2x3-dilation2",
    "same-s2",
    "reflect",
    "circular",
    "stem",
    "stem-s1",
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
    assert set(found["magnitudes"]) >= {*MAGNITUDES_OF_PAPER, "tanh_product", "tanh_separate"}
    assert set(found["angulars"]) >= set(ANGULARS_OF_PAPER)
    assert set(found["magnitudes"]) <= {*magnitudes, "tanh_product", "tanh_separate"}
    assert set(found["angulars"]) <= set(angulars)
    assert found["twinless"] == {
        f"{magnitude} {weighting} {angular}": None
        for magnitude, weighting, angular in OPERATORS
        if magnitude in MAGNITUDES_OF_PAPER and angular in ANGULARS_OF_PAPER
    }


def test_a_missing_twin_refuses_its_function_alone(interpreter: Worker) -> None:
    angle = "it has no Triton twin of the angular function 'power'"
    magnitude = "it has no Triton twin of the magnitude 'tanh_separate'"
    assert interpreter.ask("absent_twin") == {
        "tanh none power": angle,
        "tanh separate cosine": magnitude,
        "tanh none cosine": None,
        "tanh product sigmoid": None,
        "called": f"dcconv: backend 'triton' cannot run this call: {angle}",
        "report": angle,
    }


@pytest.mark.parametrize(
    ("magnitude", "angular", "named"),
    [
        ("fraction", "cosine", "magnitude 'fraction'"),
        ("tanh", "cubic", "angular function 'cubic'"),
        ("fraction", "cubic", "magnitude 'fraction'"),
    ],
)
def test_a_function_of_python_alone_is_refused(
    interpreter: Worker, magnitude: str, angular: str, named: str
) -> None:
    sentence = f"it has no Triton twin of the {named}"
    assert interpreter.ask("registered_alone", magnitude=magnitude, angular=angular) == {
        "asked": sentence,
        "called": f"dcconv: backend 'triton' cannot run this call: {sentence}",
        "known": None,
    }


def require_twin(interpreter: Worker, magnitude: str, angular: str, weighting: str) -> None:
    """Skip where the operator's functions have no twins, with the backend's sentence."""
    reason = interpreter.ask("twinless", magnitude=magnitude, angular=angular, weighting=weighting)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("magnitude", "weighting"), WEIGHTED_MAGNITUDES)
def test_magnitude_twin(interpreter: Worker, magnitude: str, weighting: str) -> None:
    require_twin(interpreter, magnitude, "cosine", weighting)
    interpreter.ask("magnitude", name=magnitude, weighting=weighting)


def test_ties(interpreter: Worker) -> None:
    assert interpreter.ask("tie", name="ball") == [1.5, 0.75, -0.75]
    assert interpreter.ask("tie", name="segmented") == [3.0, 0.25, 1.25]


@pytest.mark.parametrize("angular", ANGULARS)
def test_angular_twin(interpreter: Worker, angular: str) -> None:
    require_twin(interpreter, "tanh", angular, "none")
    interpreter.ask("angle", name=angular)


def test_functions_are_within_their_ulp(interpreter: Worker) -> None:
    for name, ulps in interpreter.ask("ulps").items():
        assert ulps <= 4, (name, ulps)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in CASES for dtype in ("float32", "float16")),
        *((case, "bfloat16") for case in CASES[::4]),
    ],
    ids=ids,
)
def test_geometry(interpreter: Worker, case: Case, dtype: str) -> None:
    """By the rule's strategy: float32 by library, short sums of half precision by fused.

    The types of half precision differ in loads and stores alone: bfloat16 in every fourth case, its
    products in float32, because the interpreter multiplies its bits.
    """
    interpreter.ask("geometry", case=case.id, dtype=dtype)


@pytest.mark.parametrize(("magnitude", "weighting"), WEIGHTED_MAGNITUDES)
def test_operator(interpreter: Worker, magnitude: str, weighting: str) -> None:
    require_twin(interpreter, magnitude, "cosine", weighting)
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
        "many-taps",
        "many-positions",
        "empty",
    ],
)
def test_depthwise(interpreter: Worker, case: str) -> None:
    interpreter.ask("depthwise", case=case)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_product(interpreter: Worker, case: str, dtype: str, layout: str) -> None:
    interpreter.ask("product", case=case, layout=layout, dtype=dtype)


@pytest.mark.parametrize("case", ["pixels", "3x3", "stem-s1"])
def test_product_in_bfloat16(interpreter: Worker, case: str) -> None:
    """Products in float32: the interpreter multiplies the bits of bfloat16."""
    interpreter.ask("product", case=case, layout="channels_last", dtype="bfloat16")


def test_every_tile(interpreter: Worker) -> None:
    interpreter.ask("tiles")


def test_tuning(interpreter: Worker) -> None:
    interpreter.ask("tunes")


def test_tuning_without_memory(interpreter: Worker) -> None:
    interpreter.ask("tunes_without_memory")


def test_what_fused_takes() -> None:
    x = torch.zeros(2, 4, 5, 5)
    weight, window = x[:, :, :1, :1], x[:, :, :3, :3]
    grouped = problem_with(groups=4)

    def reasons(weight: torch.Tensor, problem: Problem) -> list[str | None]:
        operands = Operands(x, weight, None, None, None, None)
        return [triton_fused.why_not(operands, problem, direction) for direction in DIRECTIONS]

    norm_free = "norm-free operators are one library convolution"
    librarys = "the gradient of the weight is the library's, but for depthwise layers"
    assert (
        reasons(weight, Problem())
        == reasons(window, problem_with(padding=(1, 0, 2, 1)))
        == [None, None, librarys]
    )
    assert reasons(weight, problem_with(magnitude="linear")) == [norm_free] * 3
    assert reasons(window, problem_with(stride=(1, 2))) == [
        None,
        "the gradient of the input takes stride 1, got (1, 2)",
        librarys,
    ]
    assert reasons(window, problem_with(padding_mode="reflect")) == [
        None,
        "its kernels pad with zeros, got padding_mode 'reflect'",
        librarys,
    ]
    assert reasons(window[:, :1], grouped) == [None] * 3
    everything = {"stride": (2, 3), "dilation": (2, 1), "padding_mode": "circular"}
    assert reasons(window[:, :1], problem_with(groups=4, **everything)) == [None] * 3
    linear = problem_with(groups=4, magnitude="linear")
    assert reasons(window[:, :1], linear) == [norm_free] * 3


def test_tiles_and_kernels_that_are_not_there(interpreter: Worker) -> None:
    tile = "dcconv: tile must be from -2 to 11, got "
    kernel = "dcconv: kernel must be one of "
    assert interpreter.ask("refusals") == [
        f"{tile}-3",
        f"{tile}12",
        f"{kernel}depthwise, implicit_gemm, got 'stem'",
        f"{tile}-3",
        f"{tile}12",
        f"{kernel}depthwise, implicit_gemm, got 'stem'",
    ]


def test_tiles_are_told_apart_by_their_sizes() -> None:
    assert len({tile[:3] for tile in TILES}) == len(TILES)


@pytest.mark.parametrize(
    "gpu", [Gpu(132, 227 * 1024, 4), Gpu(84, 99 * 1024, 4), Gpu(304, 65536, 2)]
)
def test_tiles_worth_a_try(gpu: Gpu) -> None:
    """They fit, are no wider than the product, and there is one for every product."""
    for lanes, depth, taps, shares, size in product(
        (1, 16, 40, 64, 512), (4, 32, 100, 2048), (1, 9), (False, True), (2, 4)
    ):
        facts = Product(100_000, 1, 1, lanes, depth, taps, shares, size)
        tried = worthwhile(facts, gpu)
        assert 1 <= len(tried) <= 8 and list(tried) == sorted(set(tried))
        assert own_rule(facts, gpu) == tried[0]
        for tile in (TILES[number] for number in tried):
            stages = min(tile.stages, gpu.stages)
            assert stages * (tile.positions + tile.lanes) * tile.depth * size <= gpu.shared
            assert tile.lanes < 2 * max(lanes, 16) and tile.depth < 2 * max(depth, 32)
            assert taps == 1 or tile.warps == 4


def test_small_products_take_small_tiles() -> None:
    gpu = Gpu(132, 227 * 1024, 4)
    sizes = [
        (tile.positions, tile.lanes)
        for tile in (
            TILES[own_rule(Product(positions, 1, groups, 256, 64, 1, False, 2), gpu)]
            for positions, groups in ((132 * 128, 1), (65 * 128, 1), (65 * 128, 2), (100, 1))
        )
    ]
    assert sizes == [(128, 128), (128, 64), (128, 128), (64, 32)]


def test_planes_take_shallow_steps_beside_many_sums() -> None:
    """64 sums of four warps and 64 elements a step had more values than registers (sm_80)."""
    facts = Product(8 * 28 * 28, 8, 1, 128, 64, 1, False, 2)
    gpu = Gpu(108, 163 * 1024, 4)
    tiles = [TILES[own_rule(facts._replace(in_planes=planes), gpu)] for planes in (False, True)]
    assert [(tile.positions, tile.lanes, tile.depth) for tile in tiles] == [
        (128, 64, 64),
        (128, 64, 32),
    ]


def test_layers_start_from_given_sums(interpreter: Worker) -> None:
    assert interpreter.ask("given_sums") == 8


def test_offsets_beyond_int32(interpreter: Worker) -> None:
    interpreter.ask("offsets_beyond_int32")


def test_opcheck_of_every_op(interpreter: Worker) -> None:
    assert len(interpreter.ask("opcheck")) == len(interpreter.ask("importable")) == 16


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_affine_relu(interpreter: Worker, dtype: str, last: bool) -> None:
    interpreter.ask("affine_relu", dtype=dtype, last=last)


def test_refusals_of_affine_relu(interpreter: Worker) -> None:
    found = interpreter.ask("affine_refusals")
    known = affine.REFUSALS.keys() - set(affine.NOT_OF_FAKES)
    expected = {name: affine.REFUSALS[name][1] for name in known}
    expected["float64"] = "scale must have dtype float32, got float64"
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        # Python's name of a dtype.
        assert re.fullmatch(f"dcconv: {words}", found[name].replace("torch.", "")), found[name]


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
        monkeypatch.setattr(tracing, "_answers", {})
        return refusals.triton(backends.Call("cuda", dtype, False, index))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert sentence() == "this GPU is sm_75; the Triton kernels are for sm_80 and newer"
    assert sentence(index=3) == "this machine has no GPU 3"
    assert sentence(torch.float64) == "its functions are float32 polynomials, got a float64 tensor"
    monkeypatch.setattr(environment, "OLDEST", (99, 1))
    assert str(sentence()).startswith("the kernels need Triton 99.1 or newer, found ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sentence() == "Triton is not installed"


def test_willing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_answers", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for transformed, want in ((False, type(None)), (True, str)):
        call = backends.Call("cuda", torch.bfloat16, transformed)
        assert isinstance(refusals.triton(call), want)
    assert all(hasattr(torch.ops.dcconv_triton, name) for name in implementations)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("triton")
    worker = Worker("compiled", {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)})
    yield worker
    worker.close()


KERNELS = (
    "affine_relu_kernel",
    "column_sums_kernel",
    "depthwise_grad_input_kernel",
    "depthwise_grad_weight_kernel",
    "depthwise_kernel",
    "epilogue_kernel",
    "filter_grad_kernel",
    "filter_norm_kernel",
    "grad_dot_kernel",
    "grad_input_kernel",
    "implicit_gemm_grad_input_kernel",
    "implicit_gemm_kernel",
    "parameter_grads_kernel",
    "pixel_sumsq_kernel",
    "window_norm_kernel",
)

# Those that read and write activations: 16 bytes per access.
WIDE = (
    "affine_relu_kernel",
    "depthwise_kernel",
    "epilogue_kernel",
    "grad_dot_kernel",
    "grad_input_kernel",
    "pixel_sumsq_kernel",
)


def test_every_kernel_is_launched_by_some_op(compiler: Worker) -> None:
    assert compiler.ask("names") == list(KERNELS)


def test_inductor_writes_out_all_that_kernels_name(compiler: Worker) -> None:
    assert compiler.ask("left_out") == []


Operator = tuple[str, str, str]


def built(
    compiler: Worker,
    kernel: str,
    target: str,
    dtype: str = "float16",
    last: bool = True,
    operator: Operator = ("tanh", "none", "cosine"),
    sums: int = records.SUM_RHO,
    window: int = 3,
    tile: int = OWN_RULE,
) -> dict[str, Any]:
    found: dict[str, Any] = compiler.ask(
        "build",
        kernel=kernel,
        target=target,
        dtype=dtype,
        last=last,
        operator=operator,
        sums=sums,
        window=window,
        tile=tile,
    )
    assert found["kind"] == ("amdgcn" if target == "gfx942" else "ptx")
    assert found["stack"] == found["spills"] == 0, found
    # Tensor cores have no float32 of full precision.
    matrices = kernel.startswith("implicit_gemm")
    assert found["products"] == (matrices and (dtype != "float32" or target == "gfx942"))
    if kernel in WIDE and sums == records.SUM_RHO:
        # The sums of pixels are one number per row of channels; waves of 64 share a tile that has
        # room for sums by four elements each.
        narrow = {"pixel_sumsq_kernel": 32}
        if target == "gfx942":
            narrow["grad_dot_kernel"] = 64
        assert found["load"] == 128 and found["store"] >= narrow.get(kernel, 128), found
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles(compiler: Worker, kernel: str, target: str) -> None:
    built(compiler, kernel, target)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_where_sizes_are_one(compiler: Worker, kernel: str) -> None:
    """Triton takes such arguments for constants, which lack the methods of tensors."""
    for sizes, last in (((8, 16, 1, 16), True), ((1, 1, 1, 1), True), ((1, 1, 1, 1), False)):
        found = compiler.ask(
            "build",
            kernel=kernel,
            target="sm_90",
            dtype="float16",
            last=last,
            operator=("tanh", "separate", "sigmoid"),
            sums=15,
            sizes=sizes,
        )
        assert found["kind"] == "ptx"


@pytest.mark.parametrize(
    ("kernel", "dtype", "last", "operator"),
    [
        ("epilogue_kernel", "float32", True, ("segmented", "linear", "sigmoid")),
        ("epilogue_kernel", "bfloat16", False, ("log", "none", "power")),
        ("grad_dot_kernel", "float32", False, ("mix", "linear", "linear")),
        ("grad_input_kernel", "bfloat16", False, ("tanh", "none", "cosine")),
        ("pixel_sumsq_kernel", "float32", False, ("tanh", "none", "cosine")),
        ("affine_relu_kernel", "bfloat16", True, ("tanh", "none", "cosine")),
        ("affine_relu_kernel", "float32", False, ("tanh", "none", "cosine")),
    ],
)
def test_kernel_compiles_for_other_operands(
    compiler: Worker, kernel: str, dtype: str, last: bool, operator: Operator
) -> None:
    built(compiler, kernel, "sm_90", dtype, last, operator)


@pytest.mark.parametrize(
    ("dtype", "last"),
    [("float16", False), ("float32", False), ("float32", True)],
    ids=["float16-contiguous", "float32-contiguous", "float32-channels_last"],
)
def test_all_sums_of_the_largest_operator_stay_in_registers(
    compiler: Worker, dtype: str, last: bool
) -> None:
    operator = ("tanh", "separate", "sigmoid")
    built(compiler, "grad_dot_kernel", "sm_90", dtype, last, operator, sums=15)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_all_sums_without_curvature_stay_in_registers(compiler: Worker, target: str) -> None:
    """The arcsine beside three sums of float32, where tiles span planes of pixels."""
    operator, sums = (
        ("tanh", "product", "linear"),
        records.SUM_RHO | records.SUM_A | records.SUM_BIAS,
    )
    built(compiler, "grad_dot_kernel", target, "float32", False, operator, sums=sums)


GEMMS = ("implicit_gemm_kernel", "implicit_gemm_grad_input_kernel")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", GEMMS)
@pytest.mark.parametrize(
    ("dtype", "last", "window"),
    [
        ("bfloat16", True, 1),
        ("float16", False, 1),
        ("float16", False, 3),
        ("float32", True, 1),
        ("float32", False, 3),
    ],
)
def test_products_compile(
    compiler: Worker, kernel: str, dtype: str, last: bool, window: int, target: str
) -> None:
    """In channels_last order operands are copied asynchronously, 16 bytes at a time."""
    found = built(compiler, kernel, target, dtype, last, window=window)
    if last and target != "gfx942":
        assert found["copies"] == 16
        assert found["store"] == 128


@pytest.mark.parametrize("number", range(len(TILES)))
def test_every_tile_compiles(compiler: Worker, number: int) -> None:
    built(compiler, GEMMS[0], "sm_90", operator=("tanh", "none", "linear"), tile=number)


@pytest.mark.parametrize("kernel", GEMMS)
def test_products_in_tf32_compile(compiler: Worker, kernel: str) -> None:
    arguments = {"dtype": "float32", "last": True, "operator": ("tanh", "none", "cosine")}
    found = compiler.ask(
        "build", kernel=kernel, target="sm_90", sums=1, window=1, tf32=True, **arguments
    )
    assert found["products"] and found["stack"] == 0, found


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "last", "window"),
    [
        ("float16", True, 3),
        ("bfloat16", True, 7),
        ("float32", True, 5),
        ("float16", False, 5),
        ("float32", False, 7),
    ],
)
@pytest.mark.parametrize("kernel", ["depthwise_grad_input_kernel", "depthwise_grad_weight_kernel"])
def test_depthwise_gradients_stay_in_registers(
    compiler: Worker, kernel: str, dtype: str, last: bool, window: int, target: str
) -> None:
    """In channels_last order x, the gradients of u and of x pass in vectors of 16 bytes."""
    found = built(compiler, kernel, target, dtype, last, window=window)
    if last:
        assert found["load"] == 128
        assert found["store"] == (128 if kernel == "depthwise_grad_input_kernel" else 32)


def test_compilers_see_the_kernels(compiler: Worker) -> None:
    """Forward: squares, window norms, filter norms, epilogue; backward: five more.

    fused has one kernel each for epilogue and product, and for grad_x and its product.
    """
    assert compiler.ask("traced", strategy="library") == {
        "triton_kernel_wrapper_functional": 9,
        "aten.convolution.default": 1,
        "aten.convolution_backward.default": 1,
    }
    assert compiler.ask("traced", strategy="fused") == {
        "triton_kernel_wrapper_functional": 9,
        "aten.convolution_backward.default": 1,
    }


def test_compilers_see_the_kernels_of_depthwise_layers(compiler: Worker) -> None:
    """Forward: norms by three, one pass; backward: seven, two of them for the weight."""
    found = compiler.ask("traced", strategy="fused", depthwise=True)
    assert found == {"triton_kernel_wrapper_functional": 11}
