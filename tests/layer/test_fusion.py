"""convert(fuse_norms=True): which batch normalisations are fused, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import NOISE_DRAWS, check, error
from torch import Tensor, fx, nn

import dcconv
from dcconv import BatchNormAct2d, fusion, pixel_sums

CHANNELS = 8


def convert(network: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dcconv: convert leaves the moving")
        return dcconv.convert(network, **{"heads": "plain", **options})


def fused(network: nn.Module) -> list[str]:
    return [name for name, part in network.named_modules() if isinstance(part, BatchNormAct2d)]


class Block(nn.Module):
    """A residual block as torchvision has it: one ReLU, in place, in both places."""

    def __init__(self, stride: int = 1, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.downsample: nn.Module | None = None
        if stride > 1:
            conv = nn.Conv2d(CHANNELS, CHANNELS, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=inplace)
        self.layers = nn.Sequential(Block(1, inplace), Block(2, inplace))
        self.fc = nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layers(x))


class Untraceable(ResNet):
    """Control flow that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Functional(ResNet):
    """F.relu in the forward method."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layers(x))


class UsedTwice(ResNet):
    """What the batch normalisation gives before its ReLU is used as well."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.bn1(self.conv1(x))
        x = F.relu(norm) if self.training else self.relu(norm) + norm
        return self.fc(self.layers(x))


class OfEvaluation(ResNet):
    """The same in evaluation mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.bn1(self.conv1(x))
        x = self.relu(norm)
        if not self.training:
            x = x + norm
        return self.fc(self.layers(x))


class Kept(ResNet):
    """An attribute that somebody reads later."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [self.bn1(self.conv1(x))]
        x = self.relu(self.seen[0])
        return self.fc(self.layers(x))


class ByHand(ResNet):
    """The forward method itself is called, which no graph has as a call of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.bn1(self.conv1(x)))
        x = first + self.bn1.forward(self.conv1(x))
        return self.fc(self.layers(first) + x[..., ::2, ::2])


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, groups=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )


ALL = ["bn1", "layers.0.bn1", "layers.1.bn1"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "in-place": (ResNet, ALL),
    "new tensors": (lambda: ResNet(inplace=False), ALL),
    "sequential": (sequential, ["1", "4"]),
    "untraceable": (Untraceable, ALL[1:]),
    "untraceable sequence": (
        lambda: nn.Sequential(Untraceable(), nn.Conv2d(3, 3, 1)),
        ["0.layers.0.bn1", "0.layers.1.bn1"],
    ),
    "functional": (Functional, ALL[1:]),
    "used twice": (UsedTwice, ALL[1:]),
    "used twice in evaluation": (OfEvaluation, ALL[1:]),
    "kept": (Kept, ALL[1:]),
    "by hand": (ByHand, ALL[1:]),
}


def results(module: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Return y, the gradients of x and of the parameters, and the statistics."""
    module = copy.deepcopy(module).train(training).to(memory_format=torch.channels_last)
    x = x.to(next(module.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    y = module(x.requires_grad_())
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *module.parameters()], cotangent)
    return [y.detach(), *grads, *[t for t in module.buffers() if t.is_floating_point()]]


def rounded_tensor(t: Tensor) -> Tensor:
    """Return float64 values that float32 would take for the same ones, or nearly so."""
    return t * (1 + (torch.rand_like(t) - 0.5) * torch.finfo(torch.float32).eps)


def rounded(module: nn.Module) -> nn.Module:
    """Return a network whose parameters are rounded once more: batch statistics amplify it."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(rounded_tensor(parameter))
    return module


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_did(name: str, training: bool, backend: str) -> None:
    """Results, gradients and running statistics next to the network without fused layers."""
    make, expected = NETWORKS[name]
    torch.manual_seed(0)
    plain = make()
    other = copy.deepcopy(plain)
    # The gradient of a radius is the rest of a sum whose terms cancel.
    plain = convert(plain, learn_radius=False)
    network = convert(other, fuse_norms=True, learn_radius=False)
    assert fused(network) == expected and not fused(plain)
    network.load_state_dict(plain.state_dict())
    wide = copy.deepcopy(plain).double()
    x = torch.randn(8, 3, 9, 8)
    got, peer, truth = (results(module, x, training) for module in (network, plain, wide))
    moved = [
        results(rounded(wide), rounded_tensor(x.double()), training) for _ in range(NOISE_DRAWS)
    ]
    for i, (one, two, three) in enumerate(zip(got, peer, truth, strict=True)):

        def noise(i: int = i, three: Tensor = three) -> float:
            return max(error(draw[i], three) for draw in moved)

        check(name, one, three, two, torch.float32, noise)


def test_the_sums_reach_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = convert(ResNet(), fuse_norms=True).train()
    taken: list[bool] = []
    fitting = pixel_sums.PixelSums.fitting

    def noted(sums: Any, *call: Any) -> Tensor | None:
        taken.append((found := fitting(sums, *call)) is not None)
        return found

    monkeypatch.setattr(pixel_sums.PixelSums, "fitting", noted)
    network(torch.randn(2, 3, 8, 8))
    # The first layer of a block, and the second one; what a sum of branches gives has none.
    assert taken == [True, True, True]


def test_relus_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Tensor] = []
    relu = F.relu
    monkeypatch.setattr(
        fusion.F, "relu", lambda x, inplace=False: ran.append(x) or relu(x, inplace)
    )
    network = convert(ResNet(), fuse_norms=True).train()
    network(torch.randn(2, 3, 8, 8))
    assert len(ran) == 2  # behind the sums of branches
    with torch.inference_mode():
        network.eval()(torch.randn(2, 3, 8, 8))
        assert len(ran) == 2 + 5  # nothing says there that nothing has changed
        assert bool((network.bn1(torch.randn(2, CHANNELS, 4, 4)) < 0).any())


def test_modules_stay_the_objects_that_they_were() -> None:
    network = ResNet()
    norm, relu, state = network.bn1, network.relu, network.state_dict(keep_vars=True)
    hook = norm.register_forward_pre_hook(lambda module, inputs: None)
    norm.note = "mine"
    convert(network, fuse_norms=True, backend="reference")
    assert network.bn1 is norm and network.relu is relu and norm.note == "mine"
    assert isinstance(norm, BatchNormAct2d) and (norm.groups, norm.backend) == (1, "reference")
    assert isinstance(relu, nn.ReLU) and relu.inplace
    for name, value in network.state_dict(keep_vars=True).items():
        assert name not in state or value is state[name]
    assert list(norm._forward_pre_hooks.values()) and norm.training
    hook.remove()
    assert not norm._forward_pre_hooks
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301
        assert fused(other) == ALL and other.bn1.before_relu
    plain = ResNet()
    plain.load_state_dict({n: v for n, v in network.state_dict().items() if n in state})


@pytest.mark.parametrize(("groups", "most"), [((1, 1, 2), 1), ((1, 2, 2), 2), ((2, 1), 2)])
def test_groups_are_those_of_most_layers_behind(groups: tuple[int, ...], most: int) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU()
            self.branches = nn.ModuleList([nn.Conv2d(16, 4, 1, groups=g) for g in groups])

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(x))
            return sum(branch(x) for branch in self.branches)

    network = Fork()
    convert(network, fuse_norms=True, heads="convert")
    assert network.norm.groups == most
    network(torch.randn(2, 16, 3, 3))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)], fusion.NO_LAYER),
        ([nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)], fusion.NO_LAYER),
        ([nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3)], fusion.NO_RELU),
        ([nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)], fusion.NO_RELU),
    ],
)
def test_what_is_left_is_named(layers: list[nn.Module], reason: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *copy.deepcopy(layers))
    text = f"dcconv: convert(fuse_norms=True) fused no batch normalisation: '1' ({reason})"
    with pytest.warns(RuntimeWarning) as said:
        convert(network, fuse_norms=True)
    assert [str(warning.message) for warning in said] == [text]
    assert fusion.why_not(network) == {"1": reason} and type(network[1]) is nn.BatchNorm2d


def test_norm_free_layers_ask_for_no_sums() -> None:
    with pytest.warns(RuntimeWarning, match="fused no batch normalisation: '1'"):
        convert(sequential()[:4], fuse_norms=True, magnitude="linear")


def test_a_network_without_batch_normalisation() -> None:
    with pytest.warns(RuntimeWarning, match="normalisation: there is no nn.BatchNorm2d$"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)), fuse_norms=True)


@pytest.mark.parametrize(
    "register",
    [
        lambda network: network[1].register_forward_hook(lambda *_: None),
        lambda network: network[1].register_full_backward_hook(lambda *_: None),
        lambda network: network[2].register_forward_hook(lambda *_: None),
        lambda network: network[2].register_forward_pre_hook(lambda *_: None),
        lambda network: setattr(network[2], "forward", F.relu),
        lambda network: setattr(network[1], "forward", lambda x: x),
    ],
    ids=["hook", "backward", "relu", "before the relu", "own relu", "own norm"],
)
def test_layers_that_somebody_looks_into_stay(register: Callable[[nn.Module], object]) -> None:
    network = sequential()
    register(network)
    convert(network, fuse_norms=True)
    assert fused(network) == ["4"]
    assert fusion.why_not(network)["1"] in (fusion.NOT_PLAIN, fusion.NOT_CALLED)


def test_looking_leaves_no_trace() -> None:
    class Counting(ResNet):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.last = 0, None
            self.register_buffer("seen", torch.zeros(()))
            self.noise = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen.add_(1)
            self.noise = float(torch.rand(()))
            self.last = x
            return super().forward(x)

    network = Counting()
    network.layers.eval()
    hooked: list[Any] = []
    network.layers.register_forward_hook(lambda *arguments: hooked.append(arguments))
    modes = [part.training for part in network.modules()]
    state = torch.get_rng_state()
    convert(network, fuse_norms=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (network.count, network.last, float(network.seen), network.noise) == (0, None, 0.0, 0.0)
    assert not hooked and [part.training for part in network.modules()] == modes
    assert "count" in vars(network) and len(network.layers._forward_hooks) == 1
    assert fused(network) == ALL


def test_synchronised_batch_norm_after_fusing() -> None:
    """The ReLU is still there, and runs: so the layer may become one without it."""
    network = convert(ResNet(), fuse_norms=True)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()
    assert not fused(network) and isinstance(network.bn1, nn.SyncBatchNorm)
    x = torch.randn(2, 3, 8, 8)
    network.layers = nn.Identity()
    want = network.fc(F.relu(network.bn1(network.conv1(x))))
    torch.testing.assert_close(network(x), want)


def test_relus_hand_through_nothing_else() -> None:
    """By hand behind a fused layer a ReLU gives a new tensor, as it did."""
    relu = nn.ReLU()
    relu.__class__ = fusion.HandingReLU
    y = BatchNormAct2d(4)(torch.randn(2, 4, 3, 3))
    assert relu(y) is not y
    for x in (torch.randn(3), torch.randn(2, 4, 3, 3)):
        assert torch.equal(relu(x), F.relu(x))


def test_compiled_and_traced() -> None:
    torch._dynamo.reset()
    network = convert(ResNet(), fuse_norms=True).eval()
    x = torch.randn(2, 3, 8, 8)
    want = network(x).detach()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    check("compiled", compiled(x), want.double(), want, torch.float32)
    graph = fx.symbolic_trace(network)
    check("traced", graph(x), want.double(), want, torch.float32)
    program = torch.export.export(network, (x,)).module()
    check("exported", program(x), want.double(), want, torch.float32)


def test_calibration_of_fused_networks() -> None:
    network = convert(ResNet(), fuse_norms=True)
    other = convert(ResNet())
    other.load_state_dict(network.state_dict())
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    dcconv.calibrate(network, batches)
    dcconv.calibrate(other, batches)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)


def test_fuse_norms_is_a_boolean() -> None:
    with pytest.raises(TypeError, match=r"^dcconv: fuse_norms must be a bool, got str$"):
        dcconv.convert(sequential(), fuse_norms="yes")
