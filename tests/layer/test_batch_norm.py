"""BatchNormAct2d next to nn.BatchNorm2d and nn.ReLU: values, derivatives, state, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check, check_all, check_equal
from cases import DTYPES
from torch import Tensor, fx, nn

import dcconv
from dcconv import BatchNormAct2d, pixel_sums
from dcconv.operator import reference
from dcconv.operator.numerics import compute_dtype

FORMATS = (torch.contiguous_format, torch.channels_last)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": None, "eps": 1e-3},
    {"affine": False},
    {"bias": False, "momentum": 0.3},
    {"track_running_stats": False},
)


def ids(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{name}={v}" for name, v in value.items()) or "default"
    return str(value).removeprefix("torch.")


def plain_like(norm: BatchNormAct2d) -> nn.BatchNorm2d:
    """Return PyTorch's layer with the same options and state."""
    options = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain = nn.BatchNorm2d(*options)
    if norm.bias is None:
        plain.register_parameter("bias", None)
    own = next((t.dtype for t in norm.state_dict().values() if t.is_floating_point()), None)
    plain = plain.to(own or torch.float32).train(norm.training)
    plain.load_state_dict(norm.state_dict())
    return plain


def layer(channels: int = 6, dtype: torch.dtype = torch.float32, **options: Any) -> BatchNormAct2d:
    """Return a layer with a state that shows."""
    norm = BatchNormAct2d(channels, dtype=dtype, **options)
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.is_floating_point():
                value.copy_(
                    torch.rand(channels) + (0.0 if name.endswith(("bias", "mean")) else 0.5)
                )
    return norm


def images(*sizes: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    x = torch.randn(*sizes).to(dtype) + 0.25
    return x.contiguous(memory_format=FORMATS[last])


def rectified(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.relu(norm(x))


def beside_the_kink(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Move values whose result rounding might take to the other side of 0."""
    while bool((near := copy.deepcopy(norm)(x.double()).abs() < 0.05).any()):
        x = torch.where(near, x + 0.25, x)
    return x


def results(
    function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module
) -> dict[str, Tensor]:
    """Return y and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = function(x)
    cotangent = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(y, [x, *module.parameters()], cotangent.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *names], grads, strict=True))}


@pytest.mark.parametrize("layout", FORMATS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_and_gradients(
    backend: str, options: dict[str, Any], training: bool, dtype: torch.dtype, layout: Any
) -> None:
    """Parameters in x's dtype and, as under autocast, in compute dtype."""
    for own in {dtype, compute_dtype(dtype)}:
        norm = layer(6, own, groups=2, **options).train(training)
        peer, truth = plain_like(norm), plain_like(norm).double()
        for _ in range(2):  # the second batch meets running statistics that the first one moved
            x = images(3, 6, 5, 4, dtype=dtype, last=layout is torch.channels_last)
            x = beside_the_kink(x, truth)
            got = results(norm, x, norm)
            check_all(
                f"{own}",
                got,
                results(rectified(truth), x.double(), truth),
                results(rectified(peer), x, peer),
                dtype,
            )
            assert got["y"].dtype == dtype and got["y"].stride() == x.stride()
            assert norm.state_dict().keys() == peer.state_dict().keys()
            for name, value in norm.state_dict().items():
                assert torch.equal(value, peer.state_dict()[name]), name


@pytest.mark.parametrize("layout", FORMATS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_output_carries_its_sums(backend: str, dtype: torch.dtype, layout: Any) -> None:
    last = layout is torch.channels_last
    for groups in (1, 3):
        for training in (True, False):
            norm = layer(6, dtype, groups=groups).train(training)
            y = norm(images(2, 6, 4, 5, dtype=dtype, last=last))
            found = pixel_sums.of(y)
            assert found is not None and (found.groups, found.channels_last) == (groups, last)
            compute = compute_dtype(dtype)
            truth, peer = (
                reference.pixel_sums(y.detach().to(d), groups, last)
                for d in (torch.float64, compute)
            )
            check("sums", found.sums, truth, peer, compute)


def test_inputs_with_gaps(backend: str) -> None:
    norm = layer(6)
    wide = images(2, 6, 5, 8)
    for x in (wide[..., ::2], wide.transpose(2, 3), images(4, 6, 5, 4, last=True)[::2]):
        want = torch.relu(plain_like(norm)(x))
        y = norm(x)
        check("y", y, want.double(), want, torch.float32)
        assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)


def chain(dtype: torch.dtype, groups: int, training: bool, **options: Any) -> nn.Sequential:
    layout = torch.channels_last
    conv = dcconv.DecoupledConv2d(6, 4, 3, padding=1, groups=groups, dtype=dtype, **options)
    return nn.Sequential(layer(6, dtype, groups=groups), conv.to(memory_format=layout)).train(
        training
    )


def plain_chain(network: nn.Sequential) -> nn.Sequential:
    """Return the same network of PyTorch's layers and the reference."""
    norm, conv = network[0], copy.deepcopy(network[1])
    assert isinstance(norm, BatchNormAct2d)
    conv.backend = "reference"
    return nn.Sequential(plain_like(norm), nn.ReLU(), conv)


def noted_sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Return a list that grows by what every layer is given whose input has sums."""
    given: list[Tensor | None] = []
    fitting = pixel_sums.PixelSums.fitting

    def noted(sums: Any, *call: Any) -> Tensor | None:
        given.append(fitting(sums, *call))
        return given[-1]

    monkeypatch.setattr(pixel_sums.PixelSums, "fitting", noted)
    return given


@pytest.mark.parametrize("options", [{}, {"radius_unit": "absolute", "bias": True}], ids=ids)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_next_layer_starts_from_the_sums(
    backend: str,
    dtype: torch.dtype,
    groups: int,
    training: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = chain(dtype, groups, training, **options)
    truth, peer = plain_chain(network).double(), plain_chain(network)
    given = noted_sums(monkeypatch)
    x = beside_the_kink(images(2, 6, 5, 4, dtype=dtype, last=True), truth[0])
    renamed = {"0": "0", "1": "2"}

    def named(found: dict[str, Tensor]) -> dict[str, Tensor]:
        back = {new: old for old, new in renamed.items()}
        return {
            name if "." not in name else f"{back[name[0]]}{name[1:]}": value
            for name, value in found.items()
        }

    got = results(network, x, network)
    assert len(given) == 1 and given[0] is not None
    check_all(
        "chain",
        got,
        named(results(truth, x.double(), truth)),
        named(results(peer, x, peer)),
        dtype,
    )
    if network[1].norm_mean is not None:
        found = (n.norm_mean for n in (network[1], truth[2], peer[2]))
        check("norm_mean", *found, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(backend: str, training: bool) -> None:
    network = chain(torch.float64 if backend != "triton" else torch.float32, 1, training)
    other = plain_chain(network)
    x = images(2, 6, 4, 4, dtype=network[0].weight.dtype)
    found = []
    for module in (network, other):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *module.parameters()]
        first = torch.autograd.grad(module(leaf).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for one, two in zip(*found, strict=True):
        check("second derivative", one, two.double(), two, one.dtype)


def test_state_dicts_are_those_of_the_plain_layer() -> None:
    norm, plain = layer(4, groups=2), nn.BatchNorm2d(4)
    assert list(norm.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(norm.state_dict())
    again = BatchNormAct2d(4)
    again.load_state_dict(plain.state_dict())
    for name, value in norm.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_copies_and_pickles() -> None:
    norm = layer(4, groups=2, backend="reference")
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):  # noqa: S301
        assert (other.groups, other.backend) == (2, "reference")
        x = images(2, 4, 3, 3)
        assert torch.equal(other(x), copy.deepcopy(norm)(x))


def test_what_a_changed_output_carries() -> None:
    """Nothing, as soon as it is changed in place by whatever name; copies and results neither."""
    norm = layer(4)
    x = images(2, 4, 3, 3)
    changes: dict[str, Callable[[Tensor], object]] = {
        "itself": lambda y: y.add_(1),
        "relu": torch.relu_,
        "view": lambda y: y[0].mul_(2),
        "detached": lambda y: y.detach().zero_(),
        "index": lambda y: y.__setitem__(0, 1.0),
        "memory": lambda y: setattr(y, "data", torch.ones_like(y)),
        "strides": lambda y: y.transpose_(2, 3),
    }
    for name, change in changes.items():
        y = norm(x).detach() if name == "memory" else norm(x)
        with torch.no_grad():
            y = norm(x)
        assert pixel_sums.of(y) is not None
        change(y)
        assert pixel_sums.of(y) is None, name
    with torch.no_grad():
        y = norm(x)
    for other in (y.clone(), y * 1, y.view_as(y), y.detach(), y[:], y.double(), copy.copy(y)):
        assert pixel_sums.of(other) is None
    twin = y.view_as(y)
    vars(twin).update(vars(y))
    assert pixel_sums.of(twin) is None and pixel_sums.of(y) is not None


def test_what_copies_of_a_changed_output_carry() -> None:
    """A copy's own count of changes begins anew."""
    with torch.no_grad():
        y = layer(4)(images(2, 4, 3, 3))
        y.mul_(2)
        file = io.BytesIO()
        torch.save(y, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        pickled = pickle.loads(pickle.dumps(y))  # noqa: S301
        for other in (copy.deepcopy(y), pickled, loaded, copy.copy(y)):
            assert torch.equal(other, y) and pixel_sums.of(other) is None


def test_a_changed_output_is_convolved_as_it_is(backend: str) -> None:
    network = chain(torch.float32, 1, False).requires_grad_(False)
    norm, conv = network
    y = norm(images(2, 6, 4, 4, last=True))
    y.mul_(3)
    want = conv(y.clone())
    assert torch.equal(conv(y), want)


def test_layers_with_other_groups_find_their_own() -> None:
    norm, conv = layer(6, groups=2).eval(), dcconv.DecoupledConv2d(6, 6, 3, groups=3).eval()
    with torch.no_grad():
        y = norm(images(2, 6, 4, 4))
    assert pixel_sums.of(y) is not None
    assert torch.equal(conv(norm(images(0, 6, 4, 4))), conv(images(0, 6, 4, 4)))
    assert torch.equal(conv(y), conv(y.clone()))
    # One layout for y, another for the call.
    grouped = dcconv.DecoupledConv2d(6, 6, 3, groups=2).eval().to(memory_format=torch.channels_last)
    x = images(2, 6, 4, 4)
    check("y", grouped(norm(x)), (w := grouped(norm(x).clone())).double(), w, torch.float32)


def test_inference_mode_counts_no_changes() -> None:
    network = chain(torch.float32, 1, False)
    x = images(2, 6, 4, 4, last=True)
    want = network(x).detach()
    with torch.inference_mode():
        y = network[0](x)
        assert pixel_sums.of(y) is None
        check("y", network(x), want.double(), want, torch.float32)


def test_autocast(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch normalisation stays in its input's dtype; a cast of its output is another tensor."""
    network = chain(torch.float32, 1, True)
    x = images(2, 6, 4, 4, last=True)
    plain = plain_chain(network)
    with torch.autocast("cpu", torch.bfloat16):
        norm = network[0](x)
        assert norm.dtype == plain[0](x).dtype == torch.float32
        y, want = network(x), plain(x)
        assert y.dtype == torch.bfloat16
        check("y", y, want.double(), want, torch.bfloat16)
        given = noted_sums(monkeypatch)
        network(x)
        assert not given
        half = network[0](x.bfloat16())
        assert half.dtype == torch.bfloat16 and pixel_sums.of(half) is not None
        network[1](half)
        assert len(given) == 1


def test_empty_batches_and_single_values() -> None:
    norm = layer(4)
    assert norm(images(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    message = "Expected more than 1 value per channel when training"
    with pytest.raises(ValueError, match=message):
        norm(images(1, 4, 1, 1))
    assert int(norm.num_batches_tracked) == int(plain_like(norm).num_batches_tracked)
    x = images(1, 4, 1, 1)
    assert torch.equal(norm.eval()(x), torch.relu(plain_like(norm)(x)))


def test_memory_goes_with_the_output() -> None:
    import gc
    import weakref

    gc.disable()
    try:
        x = images(2, 4, 3, 3).requires_grad_()
        y = layer(4)(x)
        found = pixel_sums.of(y)
        assert found is not None
        sums, output = weakref.ref(found.sums), weakref.ref(y)
        del found, y
        assert sums() is None and output() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    network = chain(torch.float64, 1, True)
    x = images(2, 6, 4, 4, dtype=torch.float64, last=True)
    found = []
    for run in (network, lambda t: checkpoint(network, t, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        network.zero_grad()
        with dcconv.norm_updates(False):
            y = run(leaf)
            y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in network.parameters())])
    for one, two in zip(*found, strict=True):
        check("recomputed", two, one, one, torch.float64)


def test_hooks_may_change_the_output() -> None:
    network = chain(torch.float32, 1, False).requires_grad_(False)
    norm, conv = network
    x = images(2, 6, 4, 4, last=True)
    handle = norm.register_forward_hook(lambda module, inputs, y: y * 2)
    assert torch.equal(network(x), conv(norm(x)))
    handle.remove()
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(x)
    assert seen == [x]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_networks(training: bool) -> None:
    """One graph, without the sums and with the same results."""
    torch._dynamo.reset()
    network = chain(torch.float32, 1, training)
    x = images(2, 6, 4, 4, last=True)
    other = copy.deepcopy(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    got, want = results(compiled, x, network), results(other, x, other)
    for name, value in want.items():
        check(name, got[name], value.double(), value, torch.float32)
    for name, value in other.state_dict().items():
        if value.is_floating_point():
            check_equal(name, network.state_dict()[name], value)
        else:
            assert torch.equal(network.state_dict()[name], value)
    # A marked output is a plain input of compiled code.
    y = other[0](x).detach()
    conv = torch.compile(other[1].eval(), backend="aot_eager", fullgraph=True)
    check("conv", conv(y), (w := other[1](y)).double(), w, torch.float32)


def test_exported_programs() -> None:
    network = chain(torch.float32, 1, False)
    x = images(2, 6, 4, 4, last=True)
    want = network(x).detach()
    for strict in (False, True):
        program = torch.export.export(network, (x,), strict=strict)
        y = program.module()(x)
        check("y", y, want.double(), want, torch.float32)


@pytest.mark.filterwarnings("ignore:dcconv. torch.jit.trace records plain:RuntimeWarning")
def test_recorded_networks() -> None:
    """Sums of the example would be constants of the program."""
    network = chain(torch.float32, 1, False).requires_grad_(False)
    x, other = images(2, 6, 4, 4, last=True), images(2, 6, 4, 4, last=True)
    traced = torch.jit.trace(network, x)
    check("y", traced(other), (w := network(other)).double(), w, torch.float32)
    y, moved = network[0](x), network[0](other)
    for record in (
        lambda f, t: torch.jit.trace(f, t),
        lambda f, t: fx.experimental.proxy_tensor.make_fx(f)(t),
    ):
        assert pixel_sums.of(y) is not None
        program = record(network[1], y)
        w = network[1](moved)
        check("y", program(moved), w.double(), w, torch.float32)


def test_transforms() -> None:
    from torch.func import functional_call, grad, jvp, vmap

    network = chain(torch.float64, 1, False)
    x = images(3, 6, 4, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(network, parameters, image.unsqueeze(0)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    total = network(x).square().sum()
    grads = torch.autograd.grad(total, list(network.parameters()))
    for name, value in zip(parameters, grads, strict=True):
        check(name, each[name].sum(0), value, value, torch.float64)
    direction = (torch.ones_like(x),)
    _, tangent = jvp(network, (x,), direction)
    _, expected = jvp(plain_chain(network), (x,), direction)
    check_equal("tangent", tangent, expected)


def test_tracers_see_one_call() -> None:
    network = chain(torch.float32, 1, False)
    graph = fx.symbolic_trace(network)
    assert [n.op for n in graph.graph.nodes] == [
        *("placeholder", "call_module", "call_module", "output")
    ]
    x = images(2, 6, 4, 4)
    assert torch.equal(graph(x), network(x))
    alone = fx.symbolic_trace(network[0])
    assert torch.equal(alone(x), network[0](x))


def test_synchronised_batch_norm_is_refused() -> None:
    text = (
        "dcconv: BatchNormAct2d must stay what it is: nn.SyncBatchNorm has no ReLU, "
        "got convert_sync_batchnorm"
    )
    with pytest.raises(NotImplementedError, match=f"^{text}$"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer(4)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_features": 0}, "num_features must be an integer of at least 1, got 0"),
        ({"groups": 0}, "groups must be an integer of at least 1, got 0"),
        ({"groups": 3}, "groups must divide num_features 4, got 3"),
        ({"eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": "a"}, "eps must be a finite number of at least 0, got str"),
        ({"momentum": 1.5}, "momentum must be None or a number from 0 to 1, got 1.5"),
        ({"momentum": "a"}, "momentum must be None or a number from 0 to 1, got str"),
        ({"affine": 2}, "affine must be a bool, got int"),
        ({"bias": None}, "bias must be a bool, got NoneType"),
        (
            {"dtype": torch.int64},
            "dtype must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"backend": "gpu"},
            "backend must be one of auto, cuda, triton, cpu, reference, got 'gpu'",
        ),
    ],
    ids=str,
)
def test_refused_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^dcconv: {text}$"):
        BatchNormAct2d(**{"num_features": 4, **options})


def test_refused_inputs() -> None:
    norm = BatchNormAct2d(4)
    for x, error, got in (
        (torch.ones(4, 3, 3), ValueError, "[4, 3, 3]"),
        (torch.ones(2, 5, 3, 3), ValueError, "[2, 5, 3, 3]"),
    ):
        with pytest.raises(error) as said:
            norm(x)
        assert str(said.value) == f"dcconv: x must have shape [n, 4, h, w], got {got}"
    with pytest.raises(
        TypeError, match=r"^dcconv: x must have dtype float16, .* got torch\.int64$"
    ):
        norm(torch.ones(2, 4, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^dcconv: x must be a tensor, got int$"):
        norm(3)
    assert int(norm.num_batches_tracked) == 0
    with pytest.raises(NotImplementedError, match=r"^dcconv: backend 'cuda' cannot run"):
        BatchNormAct2d(4, backend="cuda")(torch.ones(2, 4, 3, 3))


def test_shown_arguments() -> None:
    assert str(BatchNormAct2d(4)) == str(nn.BatchNorm2d(4)).replace("Norm2d", "NormAct2d")
    assert str(BatchNormAct2d(4, groups=2, backend="cpu")).endswith(", groups=2, backend='cpu')")
