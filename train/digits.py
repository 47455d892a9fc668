"""Train a small network on handwritten digits with decoupled convolution, beside ``nn.Conv2d``.

``python -m train.digits`` reads the 1,797 images of 8 x 8 pixels that come with scikit-learn,
trains the same network for every operator and seed on one half of them, tests it on the other,
prints a table and stores the run under ``runs/``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn

import dcconv
from dcconv import checks
from train.memory import kept_bytes
from train.networks import find_operator, small_network, start_statistics
from train.report import Epoch, Row, accuracy_text, draw_curves, make_row, table
from train.runs import RunFolder, environment

IMAGES = 1797
CLASSES = 10
IMAGE_SIZE = 8
INTERRUPTED = 130
REFUSED = 2

# What --quick sets.
QUICK: dict[str, Any] = {"epochs": 3, "seeds": (0,)}

DEFAULT_OPERATORS = (
    "conv",
    "sphere_cosine",
    "ball_cosine",
    "tanh_cosine",
    "linear_cosine",
    "segmented_cosine",
    "log_cosine",
    "linear_square_cosine_no_activation",
)


@dataclass(frozen=True)
class Config:
    """Everything a run is made of; checked on construction.

    ``shift`` is the largest random shift of a training image in pixels, ``test_share`` the share
    of the images held out, stratified by class and drawn anew for every seed.
    """

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    epochs: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 64
    lr: float = 3e-3
    # Images of 8 x 8 pixels hardly gain from a second thread, and lose much beside other work.
    threads: int = 1
    backend: str | None = None
    out: str = "runs"
    weight_decay: float = 1e-2
    warmup_share: float = 0.25
    shift: int = 1
    test_share: float = 0.5
    widths: tuple[int, ...] = (32, 64, 64)
    # The mean patch norm must settle within a few hundred steps, as batch normalisation's do.
    norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        for name in self.operators:
            find_operator(name)
        for seed in self.seeds:
            checks.integer("seeds", seed, 0)
            if seed >= 2**32:
                raise checks.value_error("seeds", "be below 2**32", seed)
        for argument, values in (("operators", self.operators), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                got = " ".join(map(str, values)) or "none"
                raise checks.value_error(argument, "be one or more, each once", got)
        checks.integer("epochs", self.epochs, 1)
        checks.integer("threads", self.threads, 1)
        checks.integer("batch_size", self.batch_size, 2)
        images = int(IMAGES * (1 - self.test_share))
        if self.batch_size > images:
            rule = f"be at most the number of training images, {images}"
            raise checks.value_error("batch_size", rule, self.batch_size)
        checks.number("lr", self.lr, "be a finite number above 0", 0.0)
        if self.backend is not None:
            dcconv.backends.check_name("backend", self.backend)


class Split(NamedTuple):
    """Images [n, 1, 8, 8] from 0 (background) to 1, and their classes [n]."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def load_split(seed: int, test_share: float) -> Split:
    """Return the digits, divided by the seed into classes' equal shares of training and test."""
    pixels, classes = load_digits(return_X_y=True)
    images = (pixels / 16.0).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE).astype("float32")
    parts = train_test_split(
        images, classes, test_size=test_share, stratify=classes, random_state=seed
    )
    train_images, test_images, train_classes, test_classes = map(torch.from_numpy, parts)
    return Split(train_images, train_classes, test_images, test_classes)


def random_shift(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Move every image by its own whole number of pixels per axis, with background moving in."""
    n, _, h, w = images.shape
    padded = F.pad(images, (largest,) * 4)
    top, left = torch.randint(2 * largest + 1, (2, n, 1), generator=generator)
    rows = (top + torch.arange(h)).reshape(n, 1, h, 1)
    columns = (left + torch.arange(w)).reshape(n, 1, 1, w)
    return padded[torch.arange(n).reshape(n, 1, 1, 1), 0, rows, columns]


def build(config: Config, operator: str) -> nn.Sequential:
    """Return an untrained network of the run."""
    return small_network(
        find_operator(operator), IMAGE_SIZE, CLASSES, config.widths, config.norm_momentum
    )


@torch.no_grad()
def evaluate(network: nn.Module, split: Split) -> float:
    """Return the share of test images that the network names right, in %, in evaluation mode."""
    network.eval()
    right = network(split.test_images).argmax(dim=1) == split.test_classes
    return 100.0 * float(right.double().mean())


def train(config: Config, operator: str, seed: int) -> Iterator[Epoch]:
    """Train one network and yield every epoch; seconds count training alone.

    The seed decides the split, the initial weights, the order and the shifts, the same for all
    operators as far as their parameters agree.
    """
    split = load_split(seed, config.test_share)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build(config, operator)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    start_statistics(network, split.train_images[: config.batch_size])
    images = len(split.train_images)
    # The rest of an epoch that fills no batch is left out; the next epoch draws a new order.
    batches = images // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=config.epochs * batches,
        pct_start=config.warmup_share,
    )
    seconds = 0.0
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        network.train()
        total = torch.zeros(())
        order = torch.randperm(images, generator=generator)
        for batch in torch.split(order[: batches * config.batch_size], config.batch_size):
            shifted = random_shift(split.train_images[batch], config.shift, generator)
            loss = F.cross_entropy(network(shifted), split.train_classes[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        seconds += time.perf_counter() - start
        yield Epoch(
            operator, seed, epoch, float(total) / batches, evaluate(network, split), seconds
        )


def measure(config: Config, operator: str) -> tuple[int, int]:
    """Return the number of parameters, and the bytes kept for backward in a training step."""
    split = load_split(config.seeds[0], config.test_share)
    images = split.train_images[: config.batch_size]
    classes = split.train_classes[: config.batch_size]
    with torch.random.fork_rng(devices=[]):
        network = build(config, operator)
    kept = kept_bytes(
        lambda: F.cross_entropy(network(images), classes),
        exclude=(*network.parameters(), *network.buffers()),
    )
    return sum(parameter.numel() for parameter in network.parameters()), kept


class Run:
    """One run: trains every operator with every seed and keeps what is finished on disk."""

    def __init__(self, config: Config, backend: str, console: Console) -> None:
        self.config = config
        self.backend = backend
        self.console = console
        self.folder = RunFolder(Path(config.out), "digits")
        self.rows: dict[str, Row] = {}
        self.epochs: list[Epoch] = []
        self.finished = 0
        self.planned = len(config.operators) * len(config.seeds)

    def store(self, status: str) -> None:
        """Write results and metrics so far."""
        self.folder.write_lines("metrics.jsonl", map(asdict, self.epochs))
        results = {
            "status": status,
            "finished_trainings": self.finished,
            "planned_trainings": self.planned,
            "rows": [asdict(row) for row in self.rows.values()],
        }
        self.folder.write_json("results.json", results)

    def train_all(self, progress: Progress) -> None:
        """Train everything, operator by operator."""
        config = self.config
        task = progress.add_task("", total=self.planned * config.epochs)
        for operator in config.operators:
            parameters, kept = measure(config, operator)
            last_epochs: list[Epoch] = []
            for seed in config.seeds:
                for epoch in train(config, operator, seed):
                    self.epochs.append(epoch)
                    text = f"{operator}, seed {seed}: {epoch.accuracy:.1f} %"
                    progress.update(task, advance=1, description=text)
                last_epochs.append(epoch)
                self.finished += 1
                self.rows[operator] = make_row(operator, parameters, kept, last_epochs)
                self.store("running")
            progress.console.print(f"{operator:<36} {accuracy_text(self.rows[operator])} %")
        progress.update(task, description="trained")

    def report(self, status: str) -> None:
        """Store the results, draw the figure and print the table."""
        self.store(status)
        rows = list(self.rows.values())
        if rows:
            self.console.print(table(rows))
            test_images = len(load_split(0, self.config.test_share).test_images)
            self.folder.write("curves.png", draw_curves(rows, self.epochs, test_images))
        if status == "interrupted":
            self.console.print(
                f"Interrupted: {self.finished} of {self.planned} trainings finished and kept"
            )
        self.console.print(f"Stored in {self.folder.path}", soft_wrap=True)

    def start(self) -> int:
        """Do the run and return the exit status of the process."""
        config = self.config
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        status = "finished"
        try:
            self.folder.write_json("config.json", asdict(config))
            self.folder.write_json("environment.json", environment() | {"backend": self.backend})
            self.folder.copy_source()
            self.console.print(
                f"trainings: {self.planned}, epochs each: {config.epochs}, "
                f"backend: {self.backend}, threads: {config.threads}"
            )
            with progress:
                self.train_all(progress)
        except KeyboardInterrupt:
            status = "interrupted"
        self.report(status)
        return INTERRUPTED if status == "interrupted" else 0


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Return the configuration that a command line asks for; a wrong one ends the process."""
    default = Config()
    parser = argparse.ArgumentParser(
        prog="python -m train.digits",
        description="Train a small decoupled network on handwritten digits, beside nn.Conv2d.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--operators",
        nargs="+",
        metavar="NAME",
        help="conv, tanh_cosine and so on; a wrong name shows what there is "
        f"(default: {' '.join(default.operators)})",
    )
    parser.add_argument("--epochs", type=int, help=f"default {default.epochs}")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help=f"one training for each (default: {' '.join(map(str, default.seeds))})",
    )
    parser.add_argument("--batch-size", type=int, help=f"default {default.batch_size}")
    parser.add_argument("--lr", type=float, help=f"largest learning rate (default {default.lr})")
    parser.add_argument("--threads", type=int, help=f"default {default.threads}")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"auto, {', '.join(dcconv.backends.names)} (default: DCCONV_BACKEND, else auto)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help=f"receives the run's folder (default {default.out})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['epochs']} epochs and one seed, where not given otherwise",
    )
    given = vars(parser.parse_args(arguments))
    values = (QUICK if given.pop("quick", False) else {}) | given
    for name in ("operators", "seeds"):
        if name in values:
            values[name] = tuple(values[name])
    try:
        return Config(**values)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.digits`` and return its exit status."""
    config = parse(arguments)
    # Output that is no terminal has no width; the table needs this much.
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 100
    torch.set_num_threads(config.threads)
    choice = nullcontext() if config.backend is None else dcconv.use_backend(config.backend)
    with choice:
        try:
            backend = dcconv.backends.choose(torch.zeros(1)).name
            run = Run(config, backend, console)
        except (NotImplementedError, ValueError) as error:
            print(error, file=sys.stderr)
            return REFUSED
        return run.start()


if __name__ == "__main__":
    sys.exit(main())
