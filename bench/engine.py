"""What the training engine costs beside a bare loop.

Both loops do the steps of the CIFAR runner's official recipe (ResNet-32, forward, loss, backward,
optimiser, projection) with the same network. The bare loop repeats one batch that lies ready; the
runner draws augmented batches from 50,000 random images in CIFAR's form, logs every tenth step,
watches for signals and shows its progress. They take turns, round by round. A step lasts from its
begin to the begin of the next, so nothing of the engine is left out but what happens once in
hundreds of steps: evaluations and checkpoints.

Printed are, for the plain and for a decoupled network, the median step of both loops (ms), what
the runner adds to the mean step (median over the rounds), the share of its time that it waits for
data, and the peak of memory in a step (MiB); at the end, step and memory as multiples of the
plain network's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.environment import environment
from bench.memory import peak_bytes
from dcconv.operator.checks import integer

# The other sub-commands do without the packages that training needs: imported where they are used.
if TYPE_CHECKING:
    from train.cifar import CifarRun
    from train.data.cifar import Cifar
    from train.task import ImageTask

IMAGES = 50_000
LOG_EVERY = 10
# The first steps of a loop warm caches, allocators and compilers up.
WARMUP = 2


@dataclass
class Costs:
    """What was measured of one network; times in seconds, one entry per step or round."""

    bare: list[float] = field(default_factory=list)
    runner: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    peak: int = 0


def random_cifar(images: int) -> Cifar:
    """Return random images in the form of CIFAR-100, few of them for the test."""
    from train.data.cifar import SIZE, Cifar

    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        size = (count, 3, SIZE, SIZE)
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(100, (count,), generator=generator)

    return Cifar(*draw(images), *draw(100), 100, Path("random"))


class Clock:
    """Notes when the steps of a task begin."""

    def __init__(self, task: ImageTask) -> None:
        self.task = task
        self.before_step = task.before_step
        self.times: list[float] = []

    def __call__(self, step: int) -> None:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.before_step(step)

    def steps(self) -> list[float]:
        """Return how long the steps were since the last call, but for the first and the last."""
        times, self.times = self.times[WARMUP:], []
        return [after - before for before, after in pairwise(times)]


def bare_step(task: ImageTask, batch: tuple[Tensor, Tensor], step: int) -> None:
    """Do one step as a script without an engine would."""
    task.before_step(step)
    task.optimizer.zero_grad(set_to_none=True)
    loss, _ = task.loss(*batch)
    loss.backward()
    task.optimizer.step()
    task.after_step(step)


def measure(options: CifarRun, data: Cifar, device: torch.device, rounds: int) -> Costs:
    """Run both loops in turn and return what they cost."""
    from train import cifar
    from train.engine.folder import METRICS, RunFolder
    from train.engine.logs import TRAIN
    from train.engine.loop import Trainer

    costs = Costs()
    task = cifar.build(options, data, device)
    clock = Clock(task)
    task.before_step = clock  # type: ignore[method-assign]
    batch = task.stream.next()
    costs.peak = peak_bytes(lambda: bare_step(task, batch, 0), device.type)

    def bare() -> list[float]:
        task.network.train()
        task.forward_network = task.network
        clock.times = []
        for step in range(options.steps):
            bare_step(task, batch, step)
        return clock.steps()

    def runner() -> list[float]:
        with tempfile.TemporaryDirectory() as parent:
            folder = RunFolder(Path(parent))
            clock.times = []
            trainer = Trainer(task, options, folder, Console(quiet=True), device=device)
            status = trainer.run()
            if status:
                # Ctrl-C or SIGTERM: the engine has ended its run by itself.
                raise SystemExit(status)
            lines = (folder.path / METRICS).read_text(encoding="utf-8").splitlines()
            records = map(json.loads, lines)
            shares = [line["waiting_share"] for line in records if line["kind"] == TRAIN]
        # The first line of the log has the warmup in it.
        costs.waiting += shares[1:] or shares
        return clock.steps()

    for number in range(rounds):
        # Each comes first in turn.
        if number % 2:
            with_engine, without = runner(), bare()
        else:
            without, with_engine = bare(), runner()
        costs.bare += without
        costs.runner += with_engine
        costs.added.append(statistics.fmean(with_engine) / statistics.fmean(without) - 1.0)
    return costs


def table_of(found: dict[str, Costs]) -> Table:
    """Return the figures of all networks; the first is the plain one."""
    headings = ("bare ms", "runner ms", "added %", "waiting %", "peak MiB", "step", "memory")
    table = Table("operator", box=None)
    for heading in headings:
        table.add_column(heading, justify="right")
    plain = next(iter(found.values()))
    for name, costs in found.items():
        bare, runner = statistics.median(costs.bare), statistics.median(costs.runner)
        table.add_row(
            name,
            f"{1e3 * bare:.1f}",
            f"{1e3 * runner:.1f}",
            f"{100 * statistics.median(costs.added):+.2f}",
            f"{100 * statistics.median(costs.waiting):.2f}",
            f"{costs.peak / 2**20:.0f}",
            f"x{runner / statistics.median(plain.runner):.2f}",
            f"x{costs.peak / plain.peak:.2f}",
        )
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    add = parser.add_argument
    add("--steps", type=int, default=20, metavar="N", help="of each loop in a round (20)")
    add("--rounds", type=int, default=5, metavar="N", help="of both loops (5)")
    add("--widths", type=int, nargs=3, default=(96, 192, 384), metavar="N", help="of ResNet-32")
    add("--batch-size", type=int, default=128, metavar="N", help="images in a step (128)")
    add("--operator", default="tanh_cosine", metavar="NAME", help="beside conv (tanh_cosine)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    add("--threads", type=int, metavar="N", help="of PyTorch (all cores)")
    add("--quick", action="store_true", help="a tiny network for a few steps: does it run at all?")


def run(given: argparse.Namespace, console: Console) -> int:
    """Measure and print."""
    from train import cifar
    from train.engine.config import from_mapping
    from train.engine.distributed import choose_device
    from train.recipes import cifar_recipes
    from train.task import presets

    images = IMAGES
    if given.quick:
        given.widths, given.batch_size, given.steps, given.rounds = (4, 6, 8), 8, 6, 2
        images = 64
    integer("--rounds", given.rounds, 1)
    integer("--steps", given.steps, WARMUP + 2)
    options = from_mapping(
        cifar.CifarRun,
        presets(cifar_recipes)["tanh_cos"]
        | {
            "steps": given.steps,
            "widths": given.widths,
            "batch_size": given.batch_size,
            "operator": given.operator,
            "device": given.device,
            "threads": given.threads,
            "evaluate_every": 0,
            "save_every": 0,
            "log_every": min(LOG_EVERY, given.steps // 2),
        },
    )
    device = choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console.print(environment(device.type).sentence, soft_wrap=True, highlight=False)
    data = random_cifar(images)
    found = {
        name: measure(replace(options, operator=name), data, device, given.rounds)
        for name in dict.fromkeys(("conv", given.operator))
    }
    console.print(table_of(found))
    return 0
