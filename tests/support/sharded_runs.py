"""What the processes of test_sharded do: the same network plain, replicated and sharded.

Every process of a run calls the same functions in the same order and returns what it found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d, patch_norm

SCALE = 100.0
COEFFICIENT = 0.3
IMAGES = 2  # per process
PASSES = 2
CPU = torch.device("cpu")

Wrap = Callable[[nn.Module], nn.Module]


def network() -> nn.Module:
    """Return layers that two processes cannot share evenly; one has a single filter."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"radius_unit": "absolute", "dtype": torch.float64}
    return nn.Sequential(
        DecoupledConv2d(3, 5, 3, bias=True, eps=1e-2, **shared),
        nn.Sequential(DecoupledConv2d(5, 6, 3, magnitude="linear", **shared), nn.Tanh()),
        DecoupledConv2d(6, 1, 1, magnitude="linear", **shared),
    )


def images(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(IMAGES, 3, 6, 6, dtype=torch.float64, generator=generator)


def fsdp2(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module.get_submodule("1"), mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def fsdp1(module: nn.Module, original: bool, nested: bool = True, **options: Any) -> nn.Module:
    options = {"use_orig_params": original, "device_id": CPU, **options}
    with warnings.catch_warnings():
        # That one process has nothing to share.
        warnings.simplefilter("ignore", UserWarning)
        if nested:
            module.set_submodule(
                "1", FullyShardedDataParallel(module.get_submodule("1"), **options)
            )
        return FullyShardedDataParallel(module, **options)


WRAPPERS: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "fsdp2": fsdp2,
    "fsdp1": lambda module: fsdp1(module, False),
    "fsdp1_original": lambda module: fsdp1(module, True),
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole parameters under the names of the plain network."""
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module):
            named = {name: whole(p) for name, p in module.named_parameters()}
    else:
        named = {name: whole(p) for name, p in module.named_parameters()}
    for prefix in ("_fsdp_wrapped_module.", "module.", "network."):
        named = {name.replace(prefix, ""): p for name, p in named.items()}
    return named


class WithLoss(nn.Module):
    """The network and its loss, whose penalty is taken in its forward."""

    def __init__(self, inner: nn.Module, coefficient: float) -> None:
        super().__init__()
        self.network = inner
        self.coefficient = coefficient

    def forward(self, x: Tensor) -> Tensor:
        loss = self.network(x).square().sum()
        if self.coefficient:
            loss = loss + dcconv.orthogonality_penalty(self.network, self.coefficient)
        return loss


def step_of(
    wrap: Wrap, rank: int, scale: float | None, first: bool, inside: bool, outside: bool
) -> dict[str, Tensor]:
    """Return minus the step of SGD at rate 1: the gradients of ``PASSES`` passes.

    Args:
        wrap: what distributes the network.
        rank: of the process, for its images.
        scale: of weighted gradients, if there are any.
        first: whether they are registered before the network is wrapped.
        inside, outside: whether the penalty is taken in the forward, or beside it.
    """
    module: nn.Module = WithLoss(network(), COEFFICIENT if inside else 0.0)
    if scale and first:
        dcconv.register_weighted_gradients(module, scale)
    if inside:
        module = wrap(module)
    else:
        assert isinstance(module, WithLoss)
        module.network = wrap(module.network)
    if scale and not first:
        dcconv.register_weighted_gradients(module, scale)
    wrapped = module if inside else module.get_submodule("network")
    before = parameters(wrapped)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for number in range(PASSES):

        def one_pass() -> None:
            loss = module(images(rank))
            if outside:
                loss = loss + dcconv.orthogonality_penalty(module, COEFFICIENT)
            loss.backward()

        if isinstance(wrapped, DistributedDataParallel) and number + 1 < PASSES:
            with wrapped.no_sync():
                one_pass()
        else:
            one_pass()
    optimizer.step()
    after = parameters(wrapped)
    return {name: before[name] - after[name] for name in before}


def steps(rank: int) -> dict[str, dict[str, Tensor]]:
    """Return the gradients by wrapper, place of the penalty, and scale and order of weighing."""
    found = {}
    for kind, wrap in WRAPPERS.items():
        # FullyShardedDataParallel has gradients of weights in its own forward only, and only for
        # what the outermost unit holds; in the forward of the others it is no part of their work.
        inside = kind.startswith("fsdp1")
        if inside:
            original = kind == "fsdp1_original"
            wrap = partial(fsdp1, original=original, nested=False)
        for scale, first in ((None, True), (SCALE, True), (SCALE, False)):
            order = "first" if first else "afterwards"
            found[f"{kind}/penalty/{scale}/{order}"] = step_of(
                wrap, rank, scale, first, inside, not inside
            )
            found[f"{kind}/alone/{scale}/{order}"] = step_of(
                WRAPPERS[kind], rank, scale, first, False, False
            )
    return found


def pruned(conv: nn.Module) -> nn.Module:
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


COMPUTED: dict[str, Wrap] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": pruned,
}


def computed(kind: str) -> nn.Module:
    """Return the network with filters of a layer computed from others."""
    module = network()
    COMPUTED[kind](module.get_submodule("0"))
    # Spectral norm takes no step then.
    return module.eval()


def computed_gradients(kind: str, wrap: Wrap) -> dict[str, Tensor]:
    """Return weighed gradients of the network's output and penalty, for filters so computed."""
    module = wrap(computed(kind))
    dcconv.register_weighted_gradients(module, SCALE)
    penalty = dcconv.orthogonality_penalty(module, COEFFICIENT)
    (module(images(0)).square().sum() + penalty).backward()
    found = {"penalty": whole(penalty)}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[name] = whole(parameter.grad)
    return found


def own_summon(module: nn.Module) -> None:
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module):
            dcconv.project_weights(module)
    else:
        dcconv.project_weights(module)


def parts(module: nn.Module) -> None:
    for part in module.children():
        dcconv.project_weights(part)


def by_optimizer(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    dcconv.register_projection(optimizer, module, 1)
    for _ in range(2):
        module(images(0)).sum().backward()
        optimizer.step()


def by_zero(module: nn.Module) -> None:
    """Each process steps for its part of the parameters and gets the others' afterwards."""
    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.0)
    dcconv.register_projection(optimizer, module, 1)
    for _ in range(2):
        module(images(0)).sum().backward()
        optimizer.step()


PROJECTIONS: dict[str, Callable[[nn.Module], None]] = {
    "whole": dcconv.project_weights,
    "own_summon": own_summon,
    "parts": parts,
    "by_optimizer": by_optimizer,
    "by_zero": by_zero,
}


def projections() -> dict[str, Any]:
    """Return projected parameters by wrapper, way and what ran before."""
    found: dict[str, Any] = {}
    for kind, wrap in WRAPPERS.items():
        for name, project in PROJECTIONS.items():
            if name == "parts" and kind.startswith("fsdp1"):
                continue
            if name == "by_zero" and kind != "ddp":
                continue
            module = wrap(network())
            # Leaves the root's layers with gathered weights.
            with torch.no_grad():
                module(images(0))
            project(module)
            with torch.no_grad():
                y = module(images(0))
            found[f"{kind}/{name}"] = parameters(module) | {"y": y}
    return found


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        return f"{kind}: {error}"
    return "accepted"


def refusals() -> dict[str, str]:
    """Return the messages of what cannot work."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(images(0), mesh, [Shard(0)])
    weight = distribute_tensor(torch.ones(2, 3, 1, 1, dtype=torch.float64), mesh, [Replicate()])
    one = distribute_tensor(torch.ones(2, dtype=torch.float64), mesh, [Replicate()])
    plain_x, plain_weight = images(0), torch.ones(2, 3, 1, 1, dtype=torch.float64)
    layer = DecoupledConv2d(3, 2, 1, dtype=torch.float64)
    held = fsdp2(network())
    found = {
        "layer x": message(lambda: layer(x)),
        "layer weight": message(lambda: held.get_submodule("2")(torch.zeros(1, 6, 1, 1).double())),
        "patch_norm": message(lambda: patch_norm(x, 3)),
        "x": message(lambda: decoupled_conv2d(x, weight)),
        "weight": message(lambda: decoupled_conv2d(plain_x, weight)),
        "bias": message(lambda: decoupled_conv2d(plain_x, plain_weight, one)),
        "radius": message(lambda: decoupled_conv2d(plain_x, plain_weight, radius=one)),
        "k": message(lambda: decoupled_conv2d(plain_x, plain_weight, k=one)),
        "norm_mean": message(lambda: decoupled_conv2d(plain_x, plain_weight, norm_mean=one.sum())),
    }

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 2, 3)))

    wrappers = WRAPPERS | {"replicate": replicate}
    for kind, wrap in wrappers.items():
        wrapped = wrap(convolutions())
        found[f"convert {kind}"] = message(lambda w=wrapped: dcconv.convert(w))
        if kind in ("fsdp2", "fsdp1", "fsdp1_original"):
            inner = wrapped.get_submodule("_fsdp_wrapped_module.0" if kind != "fsdp2" else "0")
            found[f"convert inside {kind}"] = message(lambda i=inner: dcconv.convert(i))
    for kind in ("fsdp1", "fsdp1_original"):
        module = WRAPPERS[kind](network())
        inner = module.get_submodule("_fsdp_wrapped_module.0")
        found[f"project inside {kind}"] = message(lambda i=inner: dcconv.project_weights(i))
        if dist.get_world_size() > 1 or kind == "fsdp1_original":
            found[f"penalty {kind}"] = message(lambda m=module: dcconv.orthogonality_penalty(m))
    return found


def averages() -> dict[str, list[float]]:
    """Return the moving averages after the first batch and after 500 with doubled images."""
    found = {}
    x = images(0).float()
    reduced = {
        "fsdp1": MixedPrecision(buffer_dtype=torch.bfloat16),
        "fsdp1_all": MixedPrecision(*(3 * (torch.bfloat16,))),
    }
    wrappers: dict[str, Wrap] = {
        name: lambda module, p=policy: fsdp1(module, True, False, mixed_precision=p)
        for name, policy in reduced.items()
    }
    for name, wrap in wrappers.items():
        torch.manual_seed(0)
        module = wrap(nn.Sequential(DecoupledConv2d(3, 2, 3)))
        layer = next(part for part in module.modules() if isinstance(part, DecoupledConv2d))
        found[name] = []
        with torch.no_grad():
            module(x)
            assert layer.norm_mean is not None
            found[name].append(float(layer.norm_mean))
            x2 = 2 * x
            for _ in range(500):
                module(x2)
            found[name].append(float(layer.norm_mean))
    return found


def drift(rank: int) -> dict[str, list[float]]:
    """Return this process's average after each forward, by ``sync_norm`` and kind of forward."""
    found = {}
    for sync in (False, True):
        torch.manual_seed(0)
        layer = DecoupledConv2d(3, 2, 3, norm_momentum=0.5, sync_norm=sync, dtype=torch.float64)
        module = DistributedDataParallel(layer)
        x = (1.0 + 3.0 * rank) * images(rank)

        kinds: dict[str, list[float]] = {"gradients": [], "without": [], "no_sync": []}
        assert layer.norm_mean is not None
        for _ in range(4):
            module(x).sum().backward()
            kinds["gradients"].append(float(layer.norm_mean))
        for _ in range(4):
            with torch.no_grad():
                module(x)
            kinds["without"].append(float(layer.norm_mean))
        module(x).sum().backward()
        for _ in range(4):
            with module.no_sync():
                module(x).sum().backward()
            kinds["no_sync"].append(float(layer.norm_mean))
        found |= {f"{'sync' if sync else 'apart'}/{kind}": kinds[kind] for kind in kinds}
    return found


def run(rank: int, world: int, rendezvous: str) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        return {
            "steps": steps(rank),
            "computed": {kind: computed_gradients(kind, fsdp2) for kind in COMPUTED},
            "projections": projections(),
            "refusals": refusals(),
            "averages": averages() if world == 1 else {},
            "drift": drift(rank),
        }
    finally:
        dist.destroy_process_group()


def work(rank: int, world: int, folder: Path) -> None:
    """Run as one of several processes and leave what was found in the folder."""
    torch.set_num_threads(1)
    torch.save(run(rank, world, str(folder / "rendezvous")), folder / f"{rank}.pt")
