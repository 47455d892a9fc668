"""Layers in other tracers' graphs: ``torch.fx``, ``torch.jit.trace``, TensorBoard, named sizes."""

from __future__ import annotations

import copy
import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check_all, check_equal
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dcconv
from dcconv import warn
from dcconv.operator.records import same_padding


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        dcconv.DecoupledConv2d(3, 4, 3, padding=1, **options),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        dcconv.DecoupledConv2d(4, 4, 3, padding="same", magnitude="ball", angular="sigmoid"),
    )


def images(n: int = 2, h: int = 8, w: int = 8) -> Tensor:
    return torch.randn(n, 3, h, w)


# torch.fx


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fx_records_a_leaf(training: bool) -> None:
    """One node per layer, which updates its average and follows the mode, as BatchNorm does."""
    eager = network().train(training)
    traced = fx.symbolic_trace(copy.deepcopy(eager))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2", "3"]
    for mode in (training, not training, True):
        x = images()
        want, got = eager.train(mode)(x), traced.train(mode)(x)
        assert torch.equal(got, want)
    assert traced.state_dict().keys() == eager.state_dict().keys()
    for name, value in traced.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name


def test_fx_traces_the_layer_itself() -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3)
    traced = fx.symbolic_trace(layer)
    x = images()
    assert torch.equal(traced.eval()(x), layer.eval()(x))
    assert {id(p) for p in traced.parameters()} == {id(p) for p in layer.parameters()}
    assert torch.equal(copy.deepcopy(traced)(x), layer(x))


def test_fx_runs_hooks_once_per_call() -> None:
    calls: list[str] = []
    eager = network().eval()
    eager[0].register_forward_pre_hook(lambda layer, arguments: calls.append("before"))
    eager[0].register_forward_hook(lambda layer, arguments, y: y + 1)
    traced = fx.symbolic_trace(eager)
    assert not calls
    x = images()
    assert torch.equal(traced(x), eager(x))
    assert calls == ["before"] * 2


def test_fx_takes_x_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = dcconv.DecoupledConv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x=x) + self.layer.forward(x)
            return y

    eager = ByName().eval()
    x = images()
    assert torch.equal(fx.symbolic_trace(eager)(x), eager(x))


def test_torchvision_extracts_features() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    eager = network()
    names = {"0": "first", "3": "last"}
    extractor = extraction.create_feature_extractor(eager, names)
    assert "0" in extraction.get_graph_node_names(eager)[0]
    x = images()
    for mode in (True, False):
        found = extractor.train(mode)(x)
        eager.train(mode)
        assert torch.equal(found["last"], eager(x)) or mode
        assert found["first"].shape == (2, 4, 8, 8)


def test_quantization_leaves_the_layers() -> None:
    """As it leaves every class that it does not know."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = pytest.importorskip("torch.ao.quantization").get_default_qconfig_mapping()
    eager, x = network().eval(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        prepared = quantize.prepare_fx(copy.deepcopy(eager), mapping, (x,))
    assert sum(isinstance(part, dcconv.DecoupledConv2d) for part in prepared.modules()) == 2
    check_equal("y", prepared(x), eager(x))


# torch.jit.trace


def jit_trace(module: nn.Module, x: Tensor, **options: Any) -> Any:
    """Trace a module; no size of ours is fixed, no branch of ours taken by a value."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, x, **options)
    ours = [w for w in found if issubclass(w.category, torch.jit.TracerWarning)]
    package = str(Path(dcconv.__file__).parent)
    assert not [str(w.message) for w in ours if w.filename.startswith(package)]
    return traced


def gradients(y: Tensor, module: Any) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("stored", [False, True], ids=["traced", "stored"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_jit_records_what_can_be_differentiated(training: bool, stored: bool) -> None:
    """With the tracer's own checks on; other batches and images than the traced one."""
    eager = network(weighting="separate").train(training)
    other = copy.deepcopy(eager)
    traced = jit_trace(other, images())
    for name, buffer in eager.named_buffers():
        buffer.copy_(dict(other.named_buffers())[name])  # the tracer has run it several times
    if stored:
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
    exact = copy.deepcopy(eager).double()
    with dcconv.use_backend("reference"):
        for n, h, w in ((2, 8, 8), (5, 8, 8), (3, 9, 12)):
            x = images(n, h, w)
            results: list[dict[str, Tensor]] = []
            for module, image in ((traced, x), (exact, x.double()), (eager, x)):
                y = module(image)
                buffers = {name: b.double() for name, b in module.named_buffers()}
                results.append(gradients(y, module) | buffers | {"y": y})
            check_all("traced", *results, torch.float32)


def test_jit_says_what_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_said", set())
    layer = dcconv.DecoupledConv2d(3, 4, 3, 2, "same").eval()
    with pytest.warns(RuntimeWarning, match="dcconv: ") as found:
        torch.jit.trace(layer, images())
    said = [str(w.message) for w in found if str(w.message).startswith("dcconv: ")]
    assert said == [
        "dcconv: torch.jit.trace records padding='same' at stride [2, 2] for images of 8 x 8: "
        "others may need another padding",
        "dcconv: torch.jit.trace records plain PyTorch operations; a backend that is named records "
        "its op, under torch.no_grad()",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"kernel_size": 1, "stride": 2}, {"kernel_size": 3}], ids=str)
def test_jit_asks_no_size_of_one_image(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Traced with one image, in one layout and the other; it runs with more."""
    layer = dcconv.DecoupledConv2d(3, 4, dtype=dtype, **options).eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        traced = jit_trace(layer, images(1).to(dtype, memory_format=layout))
        x = images(3, 9, 10).to(dtype, memory_format=layout)
        check_equal("y", traced(x), dcconv.DecoupledConv2d.forward(layer, x))


@pytest.mark.backend("cpu")
def test_jit_records_the_op_of_a_named_backend() -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3, padding="same", backend="cpu").eval()
    x = images(3)
    with torch.no_grad():
        traced = jit_trace(layer, images())
        assert "dcconv::conv2d_forward" in str(traced.inlined_graph)
        assert torch.equal(traced(x), layer(x))
    message = (
        r"^dcconv: backend 'cpu' cannot run this call: torch\.jit\.trace records its op under "
        r"torch\.no_grad\(\) alone, since recorded ops have no gradient$"
    )
    with pytest.raises(NotImplementedError, match=message):
        jit_trace(layer, x)


def test_tensorboard_draws_the_graph(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tensorboard.SummaryWriter(tmp_path) as writer:
            writer.add_graph(network(), images())
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"DecoupledConv2d" in content


# Named sizes


def test_same_padding_over_a_grid() -> None:
    """The formula of TensorFlow's documentation."""
    for size in range(1, 30):
        for kernel in range(1, 6):
            for stride in range(1, 6):
                for dilation in range(1, 4):
                    outputs = math.ceil(size / stride)
                    extent = dilation * (kernel - 1) + 1
                    total = max((outputs - 1) * stride + extent - size, 0)
                    found = same_padding(size, kernel, stride, dilation)
                    assert found == (total // 2, total - total // 2)


SAME: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 3}),
    ({"kernel_size": 1, "stride": 2}, {"kernel_size": (4, 3), "stride": (2, 1), "groups": 2}),
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name", [pytest.param("cpu", marks=pytest.mark.backend("cpu")), "reference"]
)
def test_export_with_named_sizes(name: str, training: bool) -> None:
    """``padding="same"`` at strides above 1: one program for every size, odd or even."""
    for layers in SAME:
        eager = nn.Sequential(
            *(dcconv.DecoupledConv2d(4, 4, padding="same", **options) for options in layers)
        ).train(training)
        sizes = {0: "n", 2: "h", 3: "w"}
        # Where a layer's result has one row or column its layout is another.
        named = {
            axis: torch.export.Dim(size, min=13 if axis else 2, max=512)
            for axis, size in sizes.items()
        }
        with dcconv.use_backend(name):
            x = torch.randn(2, 4, 16, 14)
            program = torch.export.export(copy.deepcopy(eager), (x,), dynamic_shapes=(named,))
            module = program.module()
            for n, h, w in ((2, 16, 14), (3, 17, 15), (14, 33, 24), (15, 13, 26)):
                x = torch.randn(n, 4, h, w)
                check_equal("y", module(x), eager(x))


@pytest.mark.backend("cpu")
def test_compiled_same_padding_is_one_graph() -> None:
    torch._dynamo.reset()
    eager = dcconv.DecoupledConv2d(4, 4, 3, 2, "same").eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for n, h, w in ((2, 16, 14), (3, 17, 15), (5, 8, 25)):
        x = torch.randn(n, 4, h, w)
        y, want = compiled(x), eager(x)
        check_equal("y", y, want)
        got = torch.autograd.grad(y.sum(), [eager.weight])[0]
        check_equal("weight", got, torch.autograd.grad(want.sum(), [eager.weight])[0])
        frames = frames or counter.frame_count  # the first call may begin its analysis anew
    assert counter.frame_count == frames
