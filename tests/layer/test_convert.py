"""dcconv.convert: a plain network becomes a decoupled one, and nothing else about it changes."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(6, 4, (1, 2), dilation=(1, 2), groups=2, padding="same")),
    )


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_has_its_predecessors_geometry_and_parameters(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(
        4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, padding_mode="reflect", dtype=dtype
    ).eval()
    conv.weight.requires_grad_(False)
    layer = dcconv.convert(conv, magnitude="ball", radius=2.0, learn_radius=False)
    assert isinstance(layer, DecoupledConv2d)
    assert layer.weight is conv.weight and not layer.weight.requires_grad
    assert layer.bias is conv.bias
    assert not layer.training
    x = images(9, 4).to(dtype)
    y = decoupled_conv2d(
        x,
        conv.weight,
        conv.bias,
        (2, 1),
        (1, 0),
        (1, 2),
        2,
        padding_mode="reflect",
        magnitude="ball",
        radius=2.0,
        norm_mean=layer.norm_mean,
    )
    assert y.shape == conv(x).shape
    assert torch.equal(layer(x), y)


def test_network_is_converted_in_place_with_its_operator() -> None:
    network = small()
    plain = copy.deepcopy(network)
    converted = dcconv.convert(network, magnitude="linear", angular="square_cosine", keep="dot")
    assert converted is network
    layers = [part for part in network.modules() if isinstance(part, DecoupledConv2d)]
    assert [layer.padding for layer in layers] == [(1, 1), "same"]
    assert {(layer.magnitude, layer.angular, layer.keep) for layer in layers} == {
        ("linear", "square_cosine", "dot")
    }
    assert [layer.bias is not None for layer in layers] == [False, True]
    x = images()
    assert network(x).shape == plain(x).shape
    assert not torch.allclose(network(x), plain(x))


def test_state_dicts_load_both_from_the_plain_and_from_a_converted_network() -> None:
    plain, network, other = small(), dcconv.convert(small()), dcconv.convert(small())
    network(images())
    network.load_state_dict(plain.state_dict())
    assert torch.equal(network[0].weight, plain[0].weight)  # type: ignore[index]
    other.load_state_dict(network.state_dict())
    assert {name: t.tolist() for name, t in other.state_dict().items()} == {
        name: t.tolist() for name, t in network.state_dict().items()
    }
    with pytest.raises(RuntimeError, match="radius_raw"):
        small().load_state_dict(network.state_dict())


def test_select_leaves_layers_plain_and_sees_every_candidate_once() -> None:
    network = small()
    seen: list[tuple[str, nn.Conv2d]] = []

    def select(name: str, conv: nn.Conv2d) -> object:
        seen.append((name, conv))
        return re.match(r"\d\.", name)

    first, last = network[0], network[3][0]
    dcconv.convert(network, select=select)
    assert seen == [("0", first), ("3.0", last)]
    assert network[0] is first
    assert isinstance(network[3][0], DecoupledConv2d)


def test_layer_used_twice_stays_one_layer() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU()), "c": conv})
    dcconv.convert(network)
    assert isinstance(network["a"], DecoupledConv2d)
    assert network["a"] is network["c"]
    assert network["a"] is network["b"][0]


def test_weight_of_two_layers_stays_shared() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    network[1].weight = network[0].weight
    dcconv.convert(network)
    assert network[0] is not network[1]
    assert network[0].weight is network[1].weight


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_and_other_convolutions_stay() -> None:
    others: list[nn.Module] = [
        Scaled(3, 4, 1),
        nn.ConvTranspose2d(3, 4, 1),
        nn.Conv1d(3, 4, 1),
        nn.Conv3d(3, 4, 1),
        nn.LazyConvTranspose2d(4, 1),
    ]
    network = nn.ModuleList([*others, nn.Conv2d(3, 4, 1)])
    dcconv.convert(network)
    assert list(network)[:-1] == others
    assert isinstance(network[-1], DecoupledConv2d)


def test_layer_inside_a_subclass_is_converted() -> None:
    class Gated(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 1)
            self.gate = nn.Conv2d(3, 4, 1)

    network = Gated()
    assert dcconv.convert(network) is network
    assert isinstance(network.gate, DecoupledConv2d)


def test_lazy_layer_is_converted_once_it_has_its_shape() -> None:
    network = nn.Sequential(nn.LazyConv2d(4, 3))
    message = "dcconv: layer '0' must have its shape: run the network once first, got LazyConv2d"
    with pytest.raises(ValueError, match=f"^{message}$"):
        dcconv.convert(network)
    network(images())
    dcconv.convert(network)
    assert isinstance(network[0], DecoupledConv2d)
    assert network[0].in_channels == 3


def pruned() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)),
        lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)),
        pruned,
    ],
    ids=["weight_norm", "spectral_norm", "old_spectral_norm", "pruned"],
)
def test_computed_weight_is_refused_and_the_network_is_left_alone(
    make: Callable[[], nn.Module],
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), make())
    before = list(network)
    with pytest.raises(ValueError, match=r"^dcconv: layer '1' must own its weight: remove weight"):
        dcconv.convert(network)
    assert list(network) == before
    dcconv.convert(network, select=lambda name, conv: name == "0")
    assert isinstance(network[0], DecoupledConv2d)
    assert network[1] is before[1]


def test_hooks_move_to_the_new_layer_and_their_handles_still_work() -> None:
    network = small()
    calls: list[str] = []

    def kwargs_hook(*_: Any) -> None:
        calls.append("kwargs")

    handles = [
        network[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        network[0].register_forward_hook(lambda *_: calls.append("after")),
        network[0].register_forward_hook(kwargs_hook, with_kwargs=True),
        network[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    dcconv.convert(network)
    network(images().requires_grad_()).sum().backward()
    assert calls == ["before", "after", "kwargs", "backward"]
    for handle in handles:
        handle.remove()
    network(images()).sum().backward()
    assert len(calls) == 4


def test_state_dict_hooks_are_refused() -> None:
    network = small()
    network[0].register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"^dcconv: layer '0' must have no hooks on its state dict"
    ):
        dcconv.convert(network)


def test_what_others_have_set_on_a_layer_goes_to_the_new_one() -> None:
    network = small()
    conv = network[0]
    conv.index = 3  # type: ignore[assignment]
    conv.tags = tags = ["first"]  # type: ignore[assignment]
    conv.register_buffer("mask", mask := torch.ones(6))
    conv.register_buffer("scratch", torch.zeros(2), persistent=False)
    conv.gain = gain = nn.Parameter(torch.ones(1))
    conv.adapter = adapter = nn.Linear(2, 2)
    names = list(network.state_dict())
    dcconv.convert(network)
    layer: Any = network[0]
    assert isinstance(layer, DecoupledConv2d)
    assert layer.index == 3 and layer.tags is tags
    assert layer.mask is mask and layer.gain is gain and layer.adapter is adapter
    assert dict(layer.named_buffers())["scratch"].shape == (2,)
    assert set(names) <= set(network.state_dict())
    assert "0.scratch" not in network.state_dict()


@pytest.mark.parametrize("name", ["radius", "magnitude", "norm_mean", "restore_average"])
def test_attribute_that_the_new_layer_needs_itself_is_refused(name: str) -> None:
    network = small()
    network[0].__dict__[name] = 3
    message = f"layer '0' must have no attribute '{name}', a name that DecoupledConv2d needs"
    with pytest.raises(ValueError, match=f"^dcconv: {message}, got Conv2d$"):
        dcconv.convert(network)
    assert type(network[0]) is nn.Conv2d


def test_layer_whose_forward_is_replaced_is_refused() -> None:
    """Its old forward would run in the new layer, or the new one's in place of it."""
    network = small()
    conv = network[0]
    conv.old_forward = conv.forward  # type: ignore[assignment]
    message = "layer '0' must have its class's own methods: remove what replaces old_forward"
    with pytest.raises(ValueError, match=f"^dcconv: {message}"):
        dcconv.convert(network)
    dcconv.convert(network, select=lambda name, conv: name != "0")


def test_layers_of_other_classes_are_named() -> None:
    network = nn.Sequential(Scaled(3, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.warns(RuntimeWarning) as caught:
        dcconv.convert(network, heads="convert", magnitude="sphere")
    (text,) = [str(w.message) for w in caught]
    assert text == (
        "dcconv: convert left convolutions of other classes plain: "
        "'0' (Scaled), '1' (ConvTranspose2d)"
    )
    many = nn.Sequential(*(nn.Conv1d(2, 2, 1) for _ in range(10)), nn.Conv2d(2, 2, 1))
    with pytest.warns(RuntimeWarning, match=r"'7' \(Conv1d\) and 2 more$"):
        dcconv.convert(many, heads="convert")


@pytest.mark.parametrize("trained", [True, False])
def test_stale_statistics_are_told_of_where_batches_were_seen(trained: bool) -> None:
    network = small()
    if trained:
        network(images())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcconv.convert(network, heads="convert")
    told = [w for w in caught if "dcconv.calibrate(network, batches)" in str(w.message)]
    assert len(told) == trained
    assert all(w.filename == __file__ for w in told)


def test_no_random_numbers_are_drawn() -> None:
    network = small()
    before = torch.get_rng_state()
    dcconv.convert(network)
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_network_is_converted_on_its_device() -> None:
    with torch.device("meta"):
        network = dcconv.convert(small())
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}


@pytest.mark.backend("cpu")
def test_in_place_activation_straight_after_needs_keep_dot() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True))

    plain_relu = copy.deepcopy(start := network())
    plain_relu[1] = nn.ReLU()  # type: ignore[operator]
    allowed = dcconv.convert(copy.deepcopy(start), keep="dot", backend="cpu")
    refused = dcconv.convert(copy.deepcopy(start), backend="cpu")
    dcconv.convert(plain_relu, backend="reference")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        refused(images()).sum().backward()
    for one in (allowed, plain_relu):
        one(images()).square().sum().backward()
    for got, want in zip(allowed.parameters(), plain_relu.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"module": 3}, TypeError, "module must be an nn.Module, got int"),
        (
            {"select": "layer1"},
            TypeError,
            "select must be a function of a name and a layer, got str",
        ),
        (
            {"module": nn.Linear(2, 2)},
            ValueError,
            "module must have an nn.Conv2d layer, got Linear",
        ),
        (
            {"select": lambda name, conv: None},
            ValueError,
            "select must choose one of the module's 2 nn.Conv2d layers or more, got none",
        ),
        ({"magnitude": "thanh"}, ValueError, "magnitude must be one of "),
        ({"stride": 2}, TypeError, "keyword arguments must be among magnitude, angular, weighting"),
        (
            {"module": nn.Conv2d(2, 2, 1, dtype=torch.complex64)},
            TypeError,
            "dtype must be float16, bfloat16, float32 or float64, got torch.complex64",
        ),
    ],
    ids=["module", "select", "nothing", "none", "magnitude", "stride", "dtype"],
)
def test_wrong_arguments_raise_and_leave_the_network_alone(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    network = small()
    with pytest.raises(kind, match=f"^dcconv: {re.escape(message)}"):
        dcconv.convert(**{"module": network, **arguments})
    assert not any(isinstance(part, DecoupledConv2d) for part in network.modules())


def test_wrapped_network_is_refused() -> None:
    parallel = nn.parallel.DistributedDataParallel
    wrapped = parallel.__new__(parallel)
    nn.Module.__init__(wrapped)
    wrapped.module = small()
    with pytest.raises(ValueError, match=r"^dcconv: module must be converted before it is wrapped"):
        dcconv.convert(wrapped)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_resnet18_trains_after_conversion() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    network = models.resnet18(num_classes=5)
    count = sum(isinstance(part, nn.Conv2d) for part in network.modules())
    state = copy.deepcopy(network.state_dict())
    dcconv.convert(network, select=lambda name, conv: name != "conv1")
    layers = [part for part in network.modules() if isinstance(part, DecoupledConv2d)]
    assert len(layers) == count - 1
    network.load_state_dict(state)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, labels = images(32), torch.tensor([0, 3])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in network.parameters())
