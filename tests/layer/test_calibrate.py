"""dcconv.calibrate: every moving average is the mean over the batches, or nothing changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check_equal, same_numbers
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import patch_norm


def images(size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, 3, 8, 8, generator=generator)


def small() -> nn.Sequential:
    return nn.Sequential(
        DecoupledConv2d(3, 6, 3, norm_momentum=0.2),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.9),
        DecoupledConv2d(6, 4, 3, magnitude="sphere"),
    )


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in network.state_dict().items()}


def check_unchanged(network: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in network.state_dict().items():
        assert same_numbers(value, before[name]), name


BATCHES = [images(size, seed) for seed, size in enumerate((8, 16, 4))]


def test_averages_are_the_means_over_the_batches() -> None:
    network = small()
    for _ in range(3):
        network(50 * images(4))
    parameters = [p.clone() for p in network.parameters()]
    assert dcconv.calibrate(network, BATCHES) == 3
    first, norm = network[0], network[1]
    norms = [patch_norm(x, 3).mean() for x in BATCHES]
    check_equal("norm_mean", first.norm_mean, torch.stack(norms).mean())
    assert int(first.norm_mean_steps) == int(norm.num_batches_tracked) == 3
    outputs = [first(x).detach().transpose(0, 1).flatten(1) for x in BATCHES]
    means = torch.stack([y.mean(dim=1) for y in outputs])
    check_equal("mean", norm.running_mean, means.mean(dim=0))
    variances = torch.stack([y.var(dim=1) for y in outputs])
    check_equal("variance", norm.running_var, variances.mean(dim=0))
    assert all(torch.equal(a, b) for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_update_bn_leaves_the_mean_norm_stale_and_calibrate_does_not() -> None:
    network = small()
    network(images(4))
    stale = network[0].norm_mean.clone()
    loader = [(4 * x, torch.zeros(len(x))) for x in BATCHES]
    update_bn(loader, network)
    assert float((network[0].norm_mean - stale).abs()) < 0.7 * float(stale * 3)
    dcconv.calibrate(network, loader)
    want = torch.stack([patch_norm(x, 3).mean() for x, _ in loader]).mean()
    check_equal("norm_mean", network[0].norm_mean, want)


def test_modes_momenta_and_hooks_are_what_they_were() -> None:
    network = small().eval()
    network[1].train()
    dcconv.calibrate(network, BATCHES)
    assert [part.training for part in network] == [False, True, False, False, False]
    assert network[0].norm_momentum == 0.2 and network[1].momentum == 0.3
    assert not any(part._forward_pre_hooks for part in network.modules())


def test_dropout_does_not_disturb_the_statistics() -> None:
    last = nn.BatchNorm2d(6)
    network = nn.Sequential(small()[:2], nn.Dropout(0.9), last)
    before = torch.get_rng_state()
    dcconv.calibrate(network, BATCHES)
    assert torch.equal(torch.get_rng_state(), before)
    # Kept pixels are multiplied by ten, and with them the spread.
    assert float(last.running_var.mean()) < 2.0


def test_layer_used_twice_averages_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = DecoupledConv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) + self.conv(2 * x)
            return y

    network = Twice()
    dcconv.calibrate(network, BATCHES)
    means = [patch_norm(k * x, 3, padding=1).mean() for x in BATCHES for k in (1, 2)]
    check_equal("norm_mean", network.conv.norm_mean, torch.stack(means).mean())


def test_former_averages_that_are_not_finite_are_forgotten() -> None:
    network = small()
    with torch.no_grad():
        network[0].norm_mean.fill_(float("nan"))
        network[1].running_var.fill_(float("inf"))
    dcconv.calibrate(network, BATCHES)
    assert all(bool(t.isfinite().all()) for t in network.state_dict().values())


@pytest.mark.parametrize("track", [True, False], ids=["decoupled alone", "norm without averages"])
def test_network_without_batch_statistics_is_calibrated_too(track: bool) -> None:
    norm = nn.Identity() if track else nn.BatchNorm2d(6, track_running_stats=False)
    network = nn.Sequential(DecoupledConv2d(3, 6, 3), norm)
    dcconv.calibrate(network, BATCHES)
    norms = [patch_norm(x, 3).mean() for x in BATCHES]
    check_equal("norm_mean", network[0].norm_mean, torch.stack(norms).mean())


def test_compiled_network_is_calibrated_without_compiling_anew() -> None:
    network = small()
    torch.compiler.reset()
    dcconv.calibrate(torch.compile(network, backend="aot_eager"), BATCHES)
    norms = [patch_norm(x, 3).mean() for x in BATCHES]
    check_equal("norm_mean", network[0].norm_mean, torch.stack(norms).mean())


def test_average_of_zero_start_is_the_mean_as_well() -> None:
    layer = DecoupledConv2d(3, 6, 3, norm_init="zero", dtype=torch.bfloat16)
    batches = [x.bfloat16() for x in BATCHES]
    dcconv.calibrate(layer, batches)
    norms = [patch_norm(x, 3).mean() for x in batches]
    assert layer.norm_mean is not None
    check_equal("norm_mean", layer.norm_mean, torch.stack(norms).mean())


class Auxiliary(nn.Module):
    """A network with a branch that only training takes."""

    def __init__(self) -> None:
        super().__init__()
        self.main = DecoupledConv2d(3, 4, 3)
        self.branch = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.branch(x)
        y: Tensor = self.main(x)
        return y


def test_layer_that_no_batch_reaches_keeps_its_averages_and_is_named() -> None:
    network = Auxiliary()
    network(images(4))
    before = state(network.branch)
    with pytest.warns(RuntimeWarning, match=r"^dcconv: calibrate kept the averages .*: 'branch'$"):
        dcconv.calibrate(network, BATCHES)
    check_unchanged(network.branch, before)
    assert int(network.main.norm_mean_steps) == 3  # type: ignore[arg-type]


def broken() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise OSError("the disk is gone")


NOT_A_NUMBER = BATCHES[0].clone()
NOT_A_NUMBER[0, 0, 0, 0] = float("nan")

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "none": ([], ValueError, "batches must hold at least one batch of images, got none"),
    "used up": (iter(()), ValueError, "batches must hold at least one batch of images, got none"),
    "number": (3, TypeError, "batches must be an iterable of batches, got int"),
    "tensor": (BATCHES[0], TypeError, "batches must be an iterable of batches, got Tensor"),
    "dictionary": (
        [BATCHES[0], {"x": BATCHES[1]}],
        TypeError,
        "batches must hold tensors, or tuples or lists that begin with one, got dict",
    ),
    "empty": (
        [BATCHES[0], images(4)[:0]],
        ValueError,
        "batches must hold images, got shape [0, 3, 8, 8]",
    ),
    "nan": (
        [BATCHES[1], NOT_A_NUMBER],
        ValueError,
        "batches must give layer '0' finite statistics, got a norm_mean that is not",
    ),
    "shape": (
        [BATCHES[0], torch.rand(2, 5, 8, 8)],
        ValueError,
        "weight.size(1) must be in_channels / groups = 5, got 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_batches_leave_everything_as_it_was(name: str) -> None:
    batches, kind, message = REFUSED[name]
    network = small()
    network(images(4))
    network[0].eval()
    before = state(network)
    with pytest.raises(kind, match=f"^dcconv: {re.escape(message)}$"):
        dcconv.calibrate(network, batches)
    check_unchanged(network, before)
    assert [part.training for part in network] == [False, True, True, True, True]
    assert network[0].norm_momentum == 0.2 and network[1].momentum == 0.3


def test_error_of_the_loader_comes_through_and_leaves_everything_as_it_was() -> None:
    network = small()
    network(images(4))
    before = state(network)
    with pytest.raises(OSError, match="the disk is gone"):
        dcconv.calibrate(network, broken())
    check_unchanged(network, before)
    assert network[1].momentum == 0.3


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ([small()], TypeError, "model must be an nn.Module, got list"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), DecoupledConv2d(4, 4, 1, magnitude="linear")),
            ValueError,
            "model must have a layer with moving averages (norm_mean, or batch normalisation's), "
            "got Sequential",
        ),
        (
            nn.Sequential(nn.LazyBatchNorm2d()),
            ValueError,
            "model must have its shapes: run it once first, got '0'",
        ),
    ],
    ids=["list", "nothing", "lazy"],
)
def test_model_without_averages_is_refused(model: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^dcconv: {re.escape(message)}$"):
        dcconv.calibrate(model, BATCHES)


def test_model_whose_layers_no_batch_reaches_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = DecoupledConv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    network = Idle()
    before = state(network)
    message = "^dcconv: batches must reach a layer with moving averages, got none$"
    with pytest.raises(ValueError, match=message):
        dcconv.calibrate(network, BATCHES)
    check_unchanged(network, before)


def test_converted_network_needs_calibration_and_has_it() -> None:
    """Evaluated at once it is far from what it computes in training; calibrated it is close."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for _ in range(20):
        plain(5 * images(8))
    network = copy.deepcopy(plain)
    with pytest.warns(RuntimeWarning, match=r"dcconv\.calibrate\(network, batches\)"):
        dcconv.convert(network, heads="convert")
    want = network.train()(images(64)).detach()
    stale = (network.eval()(images(64)).detach() - want).norm() / want.norm()
    dcconv.calibrate(network, [images(64)])
    fresh = (network.eval()(images(64)).detach() - want).norm() / want.norm()
    assert float(stale) > 0.5
    assert float(fresh) < 0.02
