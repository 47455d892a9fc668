"""Routes around what PyTorch's CPU library gets wrong, and strides that fit one layout."""

from __future__ import annotations

import itertools
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, check_equal
from paths import TESTS, python_path
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from willing import why_not

from dcconv import DecoupledConv2d, backends, native
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator import convolution, reference
from dcconv.operator.layout import is_channels_last
from train.networks.layers import SameConv2d
from train.networks.plain import PlainConv2d, plain_convolution

SUPPORT = TESTS / "support"
ON_CPU = [
    pytest.param(
        name, marks=pytest.mark.skipif(why_not(name) is not None, reason=str(why_not(name)))
    )
    for name in ("cpu", "reference")
]
LAST, FIRST = torch.channels_last, torch.contiguous_format
OPERATORS: dict[str, dict[str, Any]] = {
    "F.conv2d": {"magnitude": "linear", "weighting": "linear"},
    "tanh": {"magnitude": "tanh", "norm_mean": "batch"},
}


def leave_nan_in_free_memory() -> None:
    for size in (1 << 6, 1 << 10, 1 << 14, 1 << 17, 1 << 20):
        del [torch.full((size,), torch.nan) for _ in range(4)][:]


def convolutions(run: Callable[[], object]) -> Iterator[tuple[str, list[Any], list[Any], str]]:
    """Yield name, shapes, plain arguments and dtype of every convolution the library was given."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    for event in record.profiler.kineto_results.events():
        if event.name() in ("aten::convolution", "aten::convolution_backward"):
            yield event.name(), event.shapes(), event.concrete_inputs(), event.dtypes()[0]


def evaluate(
    call: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad_y: Tensor, **options: Any
) -> dict[str, Tensor]:
    x, weight = (t.detach().requires_grad_() for t in tensors)
    y = call(x, weight, **options)
    leave_nan_in_free_memory()
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y.reshape(y.shape))
    return {"y": y.detach(), "grad_x": grad_x, "grad_weight": grad_weight}


def check_against_truth(
    name: str, backend: str, tensors: tuple[Tensor, ...], grad_y: Tensor, **options: Any
) -> None:
    """Accept a backend by the rule; the peer is the reference on contiguous float64 or float32."""
    got = evaluate(decoupled_conv2d, tensors, grad_y, backend=backend, **options)
    dense = tuple(t.detach().contiguous() for t in tensors)
    wide = tuple(t.double() for t in dense)
    truth = evaluate(reference.decoupled_conv2d, wide, grad_y.double(), **options)
    for key, value in got.items():
        rounded = truth[key].to(value.dtype)
        check(f"{name}: {key}", value, truth[key], rounded, value.dtype)


# Strided windows of one pixel.


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the guard around memory needs Linux and a C compiler")
    built = tmp_path_factory.mktemp("guard") / "heap_guard.so"
    source = SUPPORT / "heap_guard.c"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", built, source, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return built


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_strided_pointwise_gradients_stay_in_their_memory(guard: Path, isa: str) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(guard),
        "ONEDNN_MAX_CPU_ISA": isa,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
    }
    script = str(SUPPORT / "strided_pointwise.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    blocks, damaged = map(int, done.stdout.split())
    assert blocks > 1000
    assert damaged == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_strided_pointwise_weight_gradients_come_from_gathered_pixels(
    on_cpu: str, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 6, 9, 8, dtype=dtype).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(4, 3, 1, 1, dtype=dtype, requires_grad=True)

    def run() -> None:
        for operator in OPERATORS.values():
            y = decoupled_conv2d(
                x, weight, None, (2, 3), groups=2, dilation=2, backend=on_cpu, **operator
            )
            y.sum().backward()

    seen = [
        arguments
        for name, shapes, arguments, _ in convolutions(run)
        if name == "aten::convolution_backward" and shapes[2][1] == 3 and arguments[-1][1]
    ]
    assert len(seen) == len(OPERATORS)
    assert all(arguments[4] == [1, 1] for arguments in seen)


def test_strided_shortcuts_of_networks_gather_their_pixels() -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=LAST).requires_grad_()
    layers: list[nn.Module] = [SameConv2d(3, 4, 1, 2), PlainConv2d(3, 4, 1, 2)]
    for autocast in (False, True):
        for layer in layers:

            def run(layer: nn.Module = layer, autocast: bool = autocast) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = layer(x)
                y.float().sum().backward()

            seen = [a for n, _, a, _ in convolutions(run) if n == "aten::convolution_backward"]
            assert [a[4] for a in seen] == [[1, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_strided_pointwise_is_right(on_cpu: str, dtype: torch.dtype) -> None:
    dice = random.Random(1)
    for case in range(24):
        groups, channels, filters = (
            dice.choice([1, 1, 2, 3]),
            dice.randint(1, 9),
            dice.randint(1, 9),
        )
        stride = dice.choice([(2, 2), (1, 2), (3, 1)])
        x = torch.randn(
            dice.randint(1, 3), groups * channels, dice.randint(1, 9), dice.randint(1, 9)
        )
        weight = torch.randn(groups * filters, channels, 1, 1)
        x, weight = (t.to(dtype, memory_format=dice.choice([LAST, FIRST])) for t in (x, weight))
        rows, columns = (-(-size // s) for size, s in zip(x.shape[2:], stride, strict=True))
        grad_y = torch.randn(x.shape[0], groups * filters, rows, columns).to(dtype)
        check_against_truth(
            f"case {case}", on_cpu, (x, weight), grad_y,
            stride=stride, groups=groups, magnitude="linear", weighting="linear",
        )  # fmt: skip


def test_gathered_pixels_have_second_derivatives() -> None:
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return decoupled_conv2d(x, weight, None, 2, backend="reference")

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


# Few output columns in bfloat16.


def narrow_case(dice: random.Random, columns: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return x, weight and grad_y of so many output columns, and the geometry."""
    while True:
        kernel = dice.choice([(3, 3), (2, 2), (1, 3), (3, 1), (5, 5), (1, 2), (7, 7)])
        stride = dice.choice([1, 2, 3]), dice.choice([2, 2, 3, 4])
        padding = dice.randint(0, 2), dice.randint(0, 2)
        dilation = dice.choice([1, 1, 2]), dice.choice([1, 1, 2])
        groups = dice.choice([1, 1, 2, 8])
        width = (columns - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1 - 2 * padding[1]
        width += dice.randrange(stride[1])
        height = dice.choice([5, 8, 9])
        rows = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        if width > 0 and rows > 0:
            break
    channels, filters = dice.choice([1, 3, 8, 16, 32]), dice.choice([1, 3, 8, 16, 32])
    n = dice.randint(1, 3)
    tensors = (
        torch.randn(n, groups * channels, height, width),
        torch.randn(groups * filters, channels, *kernel),
        torch.randn(n, groups * filters, rows, columns),
    )
    layouts = [dice.choice([LAST, LAST, FIRST]) for _ in tensors]
    tensors = tuple(
        t.bfloat16().to(memory_format=layout) for t, layout in zip(tensors, layouts, strict=True)
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return tensors, options


@pytest.mark.parametrize("columns", range(1, convolution.NARROW + 1))
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_narrow_bfloat16_outputs_are_right(on_cpu: str, columns: int) -> None:
    dice = random.Random(columns)
    for case in range(40):
        (x, weight, grad_y), options = narrow_case(dice, columns)
        check_against_truth(
            f"case {case} {options}", on_cpu, (x, weight), grad_y,
            magnitude="linear", weighting="linear", **options,
        )  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_narrow_bfloat16_outputs_come_from_float32(on_cpu: str, operator: str) -> None:
    options = {"stride": (1, 2), "padding": (1, 0), "backend": on_cpu, **OPERATORS[operator]}
    weight = torch.randn(4, 32, 3, 3).bfloat16().requires_grad_()

    def dtypes(columns: int) -> set[str]:
        x = torch.randn(2, 32, 9, 2 * columns + 1).bfloat16().requires_grad_()
        run = decoupled_conv2d
        return {
            dtype
            for _, shapes, _, dtype in convolutions(
                lambda: run(x, weight, **options).float().sum().backward()
            )
            if 32 in shapes[1]
        }

    with strategy("library"), bfloat16_of_library(True):
        assert all(dtypes(columns) == {"float"} for columns in range(1, convolution.NARROW + 1))
        assert dtypes(convolution.NARROW + 1) == {"c10::BFloat16"}


@contextmanager
def bfloat16_of_library(has: bool) -> Iterator[None]:
    """Have processors with bfloat16 convolutions in the library, or without."""

    def tell(has: bool) -> None:
        if native.missing is None:
            torch.ops.dcconv.set_cpu_bfloat16(has)

    own = convolution.library_has_bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "library_has_bfloat16", lambda: has)
        tell(has)
        try:
            yield
        finally:
            tell(own())


def test_the_library_is_asked_for_bfloat16() -> None:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError as error:
        pytest.skip(f"no flags of the processor: {error}")
    if platform.machine() != "x86_64":
        pytest.skip(f"the flags are those of x86_64, this is {platform.machine()}")
    if {"avx512bw", "avx512vl", "avx512dq"} <= set(flags):
        assert convolution.library_has_bfloat16()
    elif not {"avx_vnni", "avx_ne_convert"} & set(flags):
        assert not convolution.library_has_bfloat16()


LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((3, 16, 12, 12), (24, 16, 3, 3), {"padding": 1}),
    "1x1": ((2, 32, 9, 9), (16, 32, 1, 1), {}),
    "strided": ((2, 16, 15, 15), (8, 16, 3, 3), {"stride": 2, "padding": 1}),
    "grouped": ((2, 16, 10, 10), (32, 4, 3, 3), {"groups": 4, "dilation": 2}),
    "reflect": ((2, 8, 9, 9), (8, 8, 5, 5), {"padding": 2, "padding_mode": "reflect"}),
    "one image": ((1, 8, 6, 7), (8, 8, 3, 3), {"padding": "same"}),
}


@pytest.mark.parametrize("has", [False, True], ids=["in float32", "by the library"])
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_bfloat16_is_right_either_way(
    on_cpu: str, layer: str, layout: torch.memory_format, has: bool
) -> None:
    torch.manual_seed(0)
    image, filters, options = LAYERS[layer]
    x = torch.randn(image).bfloat16().to(memory_format=layout)
    weight = torch.randn(filters).bfloat16().to(memory_format=layout)
    with bfloat16_of_library(has):
        grad_y = torch.randn_like(decoupled_conv2d(x, weight, backend=on_cpu, **options))
        for operator in (
            *OPERATORS.values(),
            {"magnitude": "ball", "angular": "sigmoid"},
            {"magnitude": "linear", "angular": "cosine", "alpha": 1.5},
        ):
            name = f"{layer} {layout} {operator}"
            check_against_truth(name, on_cpu, (x, weight), grad_y, **operator, **options)


@pytest.mark.parametrize(
    "has", [None, False, True], ids=["as it is here", "in float32", "by the library"]
)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_bfloat16_goes_where_the_library_has_kernels(
    on_cpu: str, operator: str, has: bool | None
) -> None:
    x = torch.randn(2, 16, 9, 9).bfloat16().requires_grad_()
    weight = torch.randn(8, 16, 3, 3).bfloat16().requires_grad_()

    def run() -> None:
        decoupled_conv2d(x, weight, backend=on_cpu, **OPERATORS[operator]).sum().backward()

    told = nullcontext() if has is None else bfloat16_of_library(has)
    with told, strategy("library"):
        found = {dtype for _, shapes, _, dtype in convolutions(run) if 16 in shapes[1]}
    expected = convolution.library_has_bfloat16() if has is None else has
    assert found == ({"c10::BFloat16"} if expected else {"float"})


def strategy(name: str) -> Any:
    """Return a context in which the cpu backend goes one way, where there is such a backend."""
    if native.missing is not None:
        return nullcontext()
    return ForcedStrategy(name)


class ForcedStrategy:
    """Sets how the cpu backend goes, and lets it choose again."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.ops.dcconv.set_cpu_strategy(self.name)

    def __exit__(self, *unused: object) -> None:
        torch.ops.dcconv.set_cpu_strategy("auto")


def test_narrow_outputs_of_plain_layers_come_from_float32() -> None:
    layer = PlainConv2d(8, 4, 3, 2, 1)
    x = torch.randn(2, 8, 9, 2, requires_grad=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()

    assert {dtype for *_, dtype in convolutions(run)} == {"float"}


def has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not has_amx(), reason="the processor has no AMX tiles for bfloat16")
@pytest.mark.parametrize("columns", range(1, convolution.NARROW + 4))
def test_outputs_around_the_narrow_ones_are_right_on_amx(columns: int) -> None:
    dice = random.Random(100 + columns)
    for case in range(200):
        (x, weight, grad_y), options = narrow_case(dice, columns)
        check_against_truth(
            f"case {case} {options}", "reference", (x, weight), grad_y,
            magnitude="linear", weighting="linear", **options,
        )  # fmt: skip


# Tracing leaves sizes open.


class Strided(nn.Module):
    """A strided layer with a 3x3 and one with a 1x1 window, in bfloat16, on the reference."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.bfloat16, "backend": "reference"}
        self.first = DecoupledConv2d(4, 4, 3, 2, 1, **options)
        self.second = DecoupledConv2d(4, 4, 1, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_routes_export_with_named_sizes(strict: bool) -> None:
    network = Strided().eval()
    dim = torch.export.Dim
    names = {0: dim("n"), 2: dim("h", min=5, max=99), 3: dim("w", min=5, max=99)}
    x = torch.randn(2, 4, 9, 40).bfloat16()
    exported = torch.export.export(network, (x,), dynamic_shapes=(names,), strict=strict).module()
    for n, h, w in ((3, 11, 40), (2, 5, 5), (5, 7, 99)):
        x = torch.randn(n, 4, h, w).bfloat16()
        check_equal("exported", exported(x), network(x))


def test_routes_compile_with_dynamic_sizes() -> None:
    network = Strided().eval()
    compiled = torch.compile(network, dynamic=True, fullgraph=True, backend="aot_eager")
    for w in (40, 5):
        x = torch.randn(2, 4, 9, w).bfloat16()
        check_equal("compiled", compiled(x), network(x))


# Axes of one element.


def odd(kind: str, x: Tensor) -> Tensor:
    """Return one image of [1, c, h, w] with strides that two layouts could claim."""
    last = torch.cat([x, x]).to(memory_format=LAST)
    return {
        "image": last[0],
        "image[None]": last[0][None],
        "turned": x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        "dense": x.to(memory_format=LAST),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["image", "image[None]", "turned", "dense"])
def test_one_image_has_strides_of_one_layout(
    kind: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    dice = random.Random(3)
    for groups, kernel, last in itertools.product((1, 2, 4), ((3, 3), (1, 1)), (LAST, FIRST)):
        channels, filters = dice.randint(1, 4), dice.randint(1, 4)
        x = torch.randn(1, groups * channels, 6, dice.choice([1, 5]), dtype=torch.float64)
        x = odd(kind, x.to(dtype))
        weight = torch.randn(groups * filters, channels, *kernel).to(dtype, memory_format=last)
        grad_y = torch.randn(1, groups * filters, *x.shape[-2:]).to(dtype)
        options = {"padding": tuple(size // 2 for size in kernel), "groups": groups}
        got = evaluate(
            decoupled_conv2d, (x.to(device), weight.to(device)), grad_y.to(device),
            magnitude="linear", weighting="linear", **options,
        )  # fmt: skip
        wide = (x.detach().double().contiguous(), weight.double().contiguous())
        truth = evaluate(F.conv2d, wide, grad_y.double(), **options)
        for key, value in got.items():
            name = f"groups {groups}, kernel {kernel}, {last}: {key}"
            check(name, value.cpu(), truth[key], truth[key].to(dtype), dtype)


def test_one_filter_has_strides_of_one_layout(backend: str, device: str) -> None:
    x = torch.randn(2, 8, 5, 4, device=device).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(1, 8, 3, 1, device=device)
    turned = odd("turned", weight).requires_grad_()
    y = decoupled_conv2d(x, turned, padding=1)
    y.sum().backward()
    dense = weight.clone().requires_grad_()
    decoupled_conv2d(x.detach(), dense, padding=1).sum().backward()
    assert turned.grad is not None and dense.grad is not None
    check_equal("grad", turned.grad, dense.grad)


def test_patch_norm_of_one_image(backend: str, device: str) -> None:
    x = torch.randn(1, 6, 5, 4, device=device)
    want = patch_norm(x, 3, groups=2)[0]
    check_equal("b", patch_norm(odd("image", x), 3, groups=2), want)


def test_fitted_strides_suggest_the_layout_that_they_have() -> None:
    for kind in ("image[None]", "turned", "dense"):
        t = convolution.fitted(odd(kind, torch.randn(1, 3, 4, 2)))
        assert is_channels_last(t) or t.is_contiguous()


# Layouts of gradients.


def layout(t: Tensor) -> tuple[bool, bool]:
    """Return in which layouts a tensor is dense, whatever the strides of one-element axes are."""
    return t.is_contiguous(), t.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_have_the_layouts_of_a_library_convolution(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    if backend == "reference":
        pytest.skip("the reference keeps the layouts that PyTorch's autograd adds gradients in")
    shapes = [(1, 4, 6, 3), (2, 3, 3, 3), (4, 1, 2, 3), (1, 4, 6, 1), (1, 3, 5, 3)]
    for (groups, c, o, kernel), x_layout, w_layout, stride in itertools.product(
        shapes, (FIRST, LAST), (FIRST, LAST), (1, 2)
    ):
        x = torch.randn(2, groups * c, 7, 6, device=device).to(dtype, memory_format=x_layout)
        weight = torch.randn(groups * o, c, kernel, kernel, device=device)
        weight = weight.to(dtype, memory_format=w_layout)
        grad_y = torch.randn_like(F.conv2d(x, weight, None, stride, groups=groups))
        options: dict[str, Any] = {"groups": groups, "stride": stride}
        want = evaluate(F.conv2d, (x, weight), grad_y, **options)
        for operator in OPERATORS.values():
            got = evaluate(decoupled_conv2d, (x, weight), grad_y, **options, **operator)
            for key, value in got.items():
                assert layout(value) == layout(want[key]), (key, options, kernel, operator)


@pytest.mark.parametrize("way", ["fused", "library"])
@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
def test_weight_gradients_of_both_ways_have_the_layout_of_the_result(way: str) -> None:
    x = torch.randn(2, 16, 6, 6).to(memory_format=LAST)
    weight, grad_y = torch.randn(16, 16, 1, 1), torch.randn(2, 16, 6, 6)
    deep = torch.randn(16, 16, 3, 3)
    with strategy(way), backends.use_backend("cpu"):
        for w, padding in ((weight, 0), (deep, 1)):
            got = evaluate(decoupled_conv2d, (x, w), grad_y, padding=padding)
            want = evaluate(F.conv2d, (x, w), grad_y, padding=padding)
            assert layout(got["grad_weight"]) == layout(want["grad_weight"])


def test_plain_convolution_is_f_conv2d_and_keeps_its_layout() -> None:
    for x_layout, kernel, stride in itertools.product((FIRST, LAST), (1, 3), (1, 2)):
        x = torch.randn(2, 3, 9, 7).to(memory_format=x_layout)
        weight = torch.randn(4, 3, kernel, kernel)
        y = plain_convolution(x, weight, (stride, stride), (0, 0))
        want = F.conv2d(x, weight, None, stride)
        assert y.stride() == want.stride()
        check_equal("y", y, want)
