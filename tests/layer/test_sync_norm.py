"""Two processes with small batches are one with the large batch, in a network that has no BN.

The CIFAR runner's task trains on the engine in float64, so that nothing but the order of sums is
between them. The mean patch norm is of all processes; without that, the trainings part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_files
import processes
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from dcconv.optim import decoupled_layers
from train import cifar
from train.data.cifar import load_cifar
from train.engine.config import from_mapping
from train.engine.folder import RunFolder
from train.engine.loop import Trainer
from train.engine.rng import seed_all
from train.recipes import cifar_recipes

OPERATORS = ("tanh_cosine", "segmented_square_cosine")
STEPS = 3
BATCH = 8

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo"
)


class Float64:
    """A stream whose images are float64."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.images_per_epoch = stream.images_per_epoch

    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = self.stream.next()
        return images.double(), labels

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def train(
    data: Path, folder: Path, operator: str, sync: bool, steps: int = STEPS
) -> dict[str, Any]:
    """Train some steps as this process's share says; return what came of it."""
    values = cifar.presets(cifar_recipes)["tanh_cos"] | {
        "operator": operator,
        "data": str(data),
        "verify": False,
        # Neither normalisation nor the official moving average, which is slow.
        "norm": False,
        "official": False,
        "widths": (3, 4, 5),
        "batch_size": BATCH,
        "steps": steps,
        "drops": (2,),
        "project_every": 1,
        "device": "cpu",
    }
    options = from_mapping(cifar.CifarRun, values)
    seed_all(0)
    task = cifar.build(options, load_cifar(data, 100, verify=False), torch.device("cpu"))
    task.network.double()
    for layer in decoupled_layers(task.network):
        layer.sync_norm = layer.sync_norm and sync
    task.stream = Float64(task.stream)
    task.batches = []
    gradients: list[dict[str, Tensor]] = []
    after_step = task.after_step

    def keep_gradients(step: int) -> None:
        found = {name: p.grad.clone() for name, p in task.network.named_parameters()}
        gradients.append(found)
        after_step(step)

    task.after_step = keep_gradients
    task.evaluate = lambda: {}
    trainer = Trainer(task, options, RunFolder.at(folder), Console(quiet=True))
    assert trainer.run() == 0
    return {"gradients": gradients, "network": task.network.state_dict()}


def work(rank: int, data: Path, folder: Path, port_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    try:
        results = {}
        for operator in OPERATORS:
            results[operator] = train(data, folder / f"two-{operator}", operator, True)
        results["apart"] = train(data, folder / "apart", OPERATORS[0], False, 1)
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """Return what came of one process and of each of two, by operator."""
    folder = tmp_path_factory.mktemp("sync")
    data = folder / "data"
    data_files.write_cifar_folder(data, 100, "python", train=40, test=20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {name: train(data, folder / f"one-{name}", name, True) for name in OPERATORS}
    torch.set_num_threads(threads)
    processes.run(work, data, folder, str(folder / "rendezvous"))
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {"one": one, "ranks": ranks}


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_processes_are_one_with_the_large_batch(operator, trained):
    one = trained["one"][operator]
    for rank in trained["ranks"]:
        two = rank[operator]
        assert len(one["gradients"]) == len(two["gradients"]) == STEPS
        for a, b in zip(one["gradients"], two["gradients"], strict=True):
            for name in a:
                scale = float(a[name].abs().max())
                assert scale > 0, name
                torch.testing.assert_close(
                    a[name], b[name], rtol=0, atol=1e-9 * scale + 1e-14, msg=name
                )
        names = [name for name in one["network"] if name.endswith("norm_mean")]
        assert len(names) == 31
        for name, value in one["network"].items():
            torch.testing.assert_close(value, two["network"][name], rtol=1e-9, atol=1e-12, msg=name)


def test_without_synchronisation_they_part(trained):
    together = trained["ranks"][0][OPERATORS[0]]["gradients"][0]
    apart = trained["ranks"][0]["apart"]["gradients"][0]
    far = [
        name
        for name in together
        if float((together[name] - apart[name]).abs().max())
        > 1e-5 * float(together[name].abs().max())
    ]
    assert len(far) > len(together) / 2
