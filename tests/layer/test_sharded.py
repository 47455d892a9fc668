"""Tricks, averages and refusals in one and in two processes, replicated and sharded."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from accuracy import check_equal
from torch import Tensor

import dcconv
from dcconv.operator.reference import filter_norm

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("PyTorch has no gloo", allow_module_level=True)

import sharded_runs
from sharded_runs import COEFFICIENT, PASSES, SCALE, images, network

WORLDS = (1, 2)
KINDS = tuple(sharded_runs.WRAPPERS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return what every process found, by the number of processes."""
    folder = tmp_path_factory.mktemp("sharded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = sharded_runs.run(0, 1, str(folder / "alone"))
    torch.set_num_threads(threads)
    processes.run(sharded_runs.work, processes.COUNT, folder)
    two = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {1: [one], 2: two}


def gradients(world: int, scale: float | None, penalty: bool) -> dict[str, Tensor]:
    """Return the mean over the ranks' gradients, weighed by hand."""
    module = network()
    for rank in range(world):
        (module(images(rank)).square().sum() * PASSES / world).backward()
    if penalty:
        (dcconv.orthogonality_penalty(module, COEFFICIENT) * PASSES).backward()
    result = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        result[name] = parameter.grad
        if scale is not None and name.endswith("weight"):
            layer = module.get_submodule(name.removesuffix(".weight"))
            a = filter_norm(parameter.detach(), layer.eps)
            result[name] = parameter.grad * scale * a.reshape(-1, 1, 1, 1)
    return result


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_weighed_once_and_have_the_penalty(
    kind: str, penalty: bool, world: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    for scale, order in ((None, "first"), (SCALE, "first"), (SCALE, "afterwards")):
        want = gradients(world, scale, penalty)
        for rank in found[world]:
            key = f"{kind}/{'penalty' if penalty else 'alone'}/{scale}/{order}"
            got = rank["steps"][key]
            assert got.keys() == want.keys()
            for name, gradient in want.items():
                check_equal(f"{key} {name}", got[name], gradient)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", sharded_runs.COMPUTED)
def test_computed_filters_are_weighed_and_penalised_in_shards(
    kind: str, world: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    want = sharded_runs.computed_gradients(kind, lambda module: module)
    for rank in found[world]:
        got = rank["computed"][kind]
        assert got.keys() == want.keys()
        for name, value in want.items():
            check_equal(name, got[name], value)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_projections_reach_the_weights_that_stay(
    kind: str, world: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    plain = network()
    want = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for name in want:
        if name.endswith("weight"):
            layer = plain.get_submodule(name.removesuffix(".weight"))
            want[name] /= filter_norm(want[name], layer.eps).reshape(-1, 1, 1, 1)
    plain.load_state_dict(want)
    with torch.no_grad():
        want["y"] = plain(images(0))
    for rank in found[world]:
        ways = {key: v for key, v in rank["projections"].items() if key.startswith(f"{kind}/")}
        assert len(ways) == {"ddp": 5, "fsdp2": 4}.get(kind, 3)
        for way, got in ways.items():
            assert got.keys() == want.keys()
            for name, value in want.items():
                check_equal(f"{way} {name}", got[name], value)


PLAIN = "be a plain tensor, as fully_shard's forward has it (a DTensor has to_local())"
BEFORE = "be converted before it is wrapped for distributed training"
OWN = "own its weight: remove weight norm, spectral norm, pruning or the like first"
HOLDS = "have its whole weight: pass the FullyShardedDataParallel module that holds it"
CONNECTED = "have its whole weight and pass its gradient on: take the penalty inside the forward"

REFUSALS = {
    "layer x": f"TypeError: dcconv: x must {PLAIN}, got a DTensor",
    "layer weight": f"TypeError: dcconv: weight must {PLAIN}, got a DTensor",
    "patch_norm": f"TypeError: dcconv: x must {PLAIN}, got a DTensor",
    **{
        name: f"TypeError: dcconv: {name} must {PLAIN}, got a DTensor"
        for name in ("x", "weight", "bias", "radius", "k", "norm_mean")
    },
    "convert ddp": f"ValueError: dcconv: module must {BEFORE}, got DistributedDataParallel",
    "convert replicate": f"ValueError: dcconv: module must {BEFORE}, got DDPSequential",
    "convert fsdp2": f"ValueError: dcconv: module must {BEFORE}, got FSDPSequential",
    "convert fsdp1": f"ValueError: dcconv: module must {BEFORE}, got FullyShardedDataParallel",
    "convert inside fsdp2": f"ValueError: dcconv: module must {BEFORE}, got Conv2d",
    "convert inside fsdp1": f"ValueError: dcconv: module must {OWN}, got Conv2d",
    "convert inside fsdp1_original": f"ValueError: dcconv: module must {BEFORE}, got Conv2d",
    "project inside fsdp1": f"ValueError: dcconv: model must {OWN}, got DecoupledConv2d",
    "project inside fsdp1_original": f"ValueError: dcconv: model must {HOLDS}, got DecoupledConv2d",
    "penalty fsdp1": f"ValueError: dcconv: layer '_fsdp_wrapped_module.0' must {CONNECTED}",
}


@pytest.mark.parametrize("world", WORLDS)
def test_what_cannot_work_is_refused(world: int, found: dict[int, list[dict[str, Any]]]) -> None:
    for rank in found[world]:
        for key, message in rank["refusals"].items():
            want = REFUSALS.get(key) or REFUSALS[key.removesuffix("_original")]
            assert message.startswith(want), key


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1_all"])
def test_average_moves_where_buffers_are_cast_to_half_precision(
    kind: str, found: dict[int, list[dict[str, Any]]]
) -> None:
    """One thousandth of the way is below half a unit of bfloat16."""
    first, last = found[1][0]["averages"][kind]
    assert last == pytest.approx(first * (2.0 - (1.0 - 1e-3) ** 500), rel=1e-3)


def test_averages_of_replicas_part_where_buffers_are_not_broadcast(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    """What docs/differences.md says of DistributedDataParallel, and of ``sync_norm``."""
    zero, one = (rank["drift"] for rank in found[2])
    for kind in ("gradients", "without", "no_sync"):
        assert zero[f"sync/{kind}"] == one[f"sync/{kind}"]
    m0, m1 = zero["apart/gradients"][0], one["apart/gradients"][0]
    assert m1 > 3 * m0
    # Broadcast before each forward: each rank is one update away from rank 0's average.
    assert zero["apart/gradients"] == pytest.approx([m0] * 4)
    assert one["apart/gradients"][1:] == pytest.approx([(m0 + m1) / 2] * 3)
    # The first of these forwards is still preceded by one; later ones go their own way.
    for kind in ("without", "no_sync"):
        assert zero[f"apart/{kind}"] == pytest.approx([m0] * 4)
        ways = one[f"apart/{kind}"]
        assert ways[3] > ways[2] > ways[1] > ways[0]
        assert m1 - ways[3] == pytest.approx((m1 - ways[0]) / 8)
