"""Train a small network on handwritten digits with decoupled convolution, beside ``nn.Conv2d``.

``python -m train.digits`` reads the 1,797 images of 8 x 8 pixels that come with scikit-learn,
trains the same network for every operator and seed on one half of them, tests it on the other,
prints a table and stores the run under ``runs/``. Every training is one of the engine's, in
``trainings/`` of the run's folder.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import dcconv
from dcconv.operator import checks
from train.data.digits import CLASSES, IMAGE_SIZE, IMAGES, DigitsStream, Split, load_split
from train.data.stream import Stream
from train.digits_report import Epoch, Row, accuracy_text, draw_curves, make_row, table
from train.engine.checkpoint import Checkpoints, tidy_run
from train.engine.config import EngineOptions, changes, option, parse, read_stored, to_yaml
from train.engine.files import ContentError, read_json
from train.engine.folder import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULTS,
    RunFolder,
    environment,
    json_line,
)
from train.engine.logs import EVALUATE, TRAIN, read_metrics
from train.engine.loop import FAILED, FINISHED, REFUSED, Trainer, new_console
from train.engine.owner import owned
from train.engine.rng import seed_all
from train.engine.signals import StopSignals, exit_status
from train.engine.state import count, part, require_like
from train.memory import kept_bytes
from train.networks import find_operator, small_network, start_statistics

EPOCHS = "epochs.jsonl"
CURVES = "curves.png"
TRAININGS = "trainings"
CPU = torch.device("cpu")

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of; checked on construction.

    ``full`` and ``short`` are what ``epochs`` and ``seeds`` are where not given, without and with
    ``quick``.
    """

    full: ClassVar[Mapping[str, Any]] = {"epochs": 12, "seeds": (0, 1, 2)}
    short: ClassVar[Mapping[str, Any]] = {"epochs": 3, "seeds": (0,)}
    # What a run that goes on may be told anew; the rest must stay what it was.
    free: ClassVar[frozenset[str]] = frozenset(
        {"operators", "seeds", "quick", "threads", "backend", "out", "resume", "histogram_every"}
    )

    operators: tuple[str, ...] = option(
        DEFAULT_OPERATORS, "what to convolve with; a wrong name shows what there is"
    )
    epochs: int = option(None, "rounds through the training images (default: 12, quick 3)")
    seeds: tuple[int, ...] = option(None, "one training for each (default: 0 1 2, quick 0)")
    quick: bool = option(False, "few epochs and one seed, where not given otherwise")
    batch_size: int = option(64, "images of a step")
    lr: float = option(3e-3, "largest learning rate")
    # Images of 8 x 8 pixels hardly gain from a second thread, and lose much beside other work.
    threads: int = option(1, "PyTorch's threads")
    backend: str | None = option(
        None, f"auto, {', '.join(dcconv.backends.names)} (default: DCCONV_BACKEND, else auto)"
    )
    out: str = option("runs", "folder that receives the run's own folder")
    resume: str | None = option(None, "folder of a run to go on with")
    weight_decay: float = option(1e-2, "AdamW's")
    warmup_share: float = option(0.25, "share of the steps in which the learning rate rises")
    shift: int = option(1, "largest random shift of a training image, pixels")
    test_share: float = option(
        0.5, "share of the images held out, stratified by class, drawn anew for every seed"
    )
    widths: tuple[int, ...] = option((32, 64, 64), "filters of the convolutions")
    # It must settle within a few hundred steps, as batch normalisation's averages do.
    norm_momentum: float = option(0.1, "of the mean patch norm")
    histogram_every: int = option(0, "steps between histograms for TensorBoard; 0: off")

    def __post_init__(self) -> None:
        for name, value in (self.short if self.quick else self.full).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
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
        for argument, low in (
            *(("epochs", 1), ("threads", 1), ("batch_size", 2)),
            *(("shift", 0), ("histogram_every", 0)),
        ):
            checks.integer(argument, getattr(self, argument), low)
        for argument in ("test_share", "warmup_share"):
            share = getattr(self, argument)
            if not 0.0 < share < 1.0:
                raise checks.value_error(argument, "be between 0 and 1", share)
        if min(self.train_images, self.test_images) < CLASSES:
            rule = f"leave {CLASSES} images or more for training and for testing"
            raise checks.value_error("test_share", rule, self.test_share)
        if self.batch_size > self.train_images:
            rule = f"be at most the number of training images, {self.train_images}"
            raise checks.value_error("batch_size", rule, self.batch_size)
        # PyTorch's schedule divides by the steps of the rise less one.
        if self.warmup_share * self.steps == 1.0:
            rule = f"not be exactly one step of {self.steps}"
            raise checks.value_error("warmup_share", rule, self.warmup_share)
        # Four layers halve 8 pixels to one.
        if not 1 <= len(self.widths) <= 4:
            raise checks.value_error("widths", "be four or fewer", len(self.widths) or "none")
        for width in self.widths:
            checks.integer("widths", width, 1)
        checks.number("lr", self.lr, "be a finite number above 0", 0.0)
        if not 0.0 < self.norm_momentum <= 1.0:
            rule = "be above 0 and at most 1"
            raise checks.value_error("norm_momentum", rule, self.norm_momentum)
        rule = "be a finite number of at least 0"
        checks.number("weight_decay", self.weight_decay, rule, 0.0, closed=True)
        if self.backend is not None:
            dcconv.backends.check_name("backend", self.backend)
        if self.resume is not None and not (Path(self.resume) / CONFIG).is_file():
            raise checks.value_error("resume", "be the folder of a run", repr(self.resume))

    @property
    def train_images(self) -> int:
        """Number of images for training."""
        return int(IMAGES * (1 - self.test_share))

    @property
    def test_images(self) -> int:
        """Number of images for testing."""
        return IMAGES - self.train_images

    @property
    def batches(self) -> int:
        """Steps of an epoch; the rest of the images that fills no batch is left out."""
        return self.train_images // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return self.epochs * self.batches

    def describe(self) -> str:
        """Return what a run would do, in a line."""
        return (
            f"{len(self.operators) * len(self.seeds)} trainings of {self.epochs} epochs, each "
            f"{self.batches} steps of {self.batch_size} of {self.train_images} images"
        )

    def engine(self, seed: int) -> EngineOptions:
        """Return the engine's options of one training."""
        return EngineOptions(
            steps=self.steps,
            evaluate_every=self.batches,
            save_every=0,
            keep_last=1,
            log_every=self.batches,
            histogram_every=self.histogram_every,
            device="cpu",
            threads=self.threads,
            seed=seed,
        )


class DigitsTask:
    """A network on the digits: cross entropy, AdamW, the one-cycle schedule.

    Args:
        config: of the run.
        network: untrained; its moving averages start at the first training images.
        groups: parameters with their largest learning rate each, ``{"params": ..., "lr": ...}``.
        split: the images.
        seed: of the order and the shifts.
        after_epoch: told the test accuracy (%) of every epoch.
    """

    forward_network: Callable[..., Any]

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        groups: Sequence[dict[str, Any]],
        split: Split,
        seed: int,
        after_epoch: Callable[[float], None] = lambda accuracy: None,
    ) -> None:
        self.network = network
        self.forward_network = network
        self.split = split
        self.after_epoch = after_epoch
        self.stream: Stream = DigitsStream(split, config.batch_size, seed, config.shift)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, weight_decay=config.weight_decay
        )
        start_statistics(network, split.train_images[: config.batch_size])
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in groups],
            total_steps=config.steps,
            pct_start=config.warmup_share,
        )

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross entropy."""
        return F.cross_entropy(self.forward_network(images), labels), {}

    def before_step(self, step: int) -> None:
        """Do nothing: the schedule is ahead of the step."""

    def after_step(self, step: int) -> None:
        """Set the learning rate of the next step."""
        self.schedule.step()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the share of test images that the network names right, in %."""
        right = self.network(self.split.test_images).argmax(dim=1) == self.split.test_classes
        accuracy = 100.0 * float(right.double().mean())
        self.after_epoch(accuracy)
        return {"accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is."""
        return {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the schedule was.

        Raises:
            ContentError: the state is not that of such a schedule.
        """
        own = self.schedule.state_dict()
        saved = part(state, "schedule", dict, "the task")
        require_like(saved, own, "the schedule")
        step = count(saved["last_epoch"], "the schedule's step")
        if saved["total_steps"] != own["total_steps"] or step > own["total_steps"]:
            raise ContentError(f"a schedule at {step} of {saved['total_steps']} steps")
        self.schedule.load_state_dict(saved)


class _Training(Trainer):
    """One training of a run; what can be resumed is the run."""

    def how_to_resume(self) -> str:
        """Name the command of the whole run."""
        return f"Resume with: {self.program}"


class Run:
    """One run: trains every operator with every seed and keeps what is finished on disk.

    The seed decides the split, the initial weights, the order and the shifts, the same for all
    operators as far as their parameters agree. A training is finished when its last step is saved
    and its log is whole; a run that goes on does not repeat it.
    """

    program: ClassVar[str] = "python -m train.digits"
    name: ClassVar[str] = "digits"

    def __init__(self, config: Config, console: Console) -> None:
        self.config = config
        self.console = console
        self.backend = dcconv.backends.choose(torch.zeros(1)).name
        if config.resume is None:
            self.folder = RunFolder.create(Path(config.out), self.name)
        else:
            self.folder = RunFolder(Path(config.resume))
        self.rows: dict[str, Row] = {}
        self.epochs: list[Epoch] = []
        self.finished = 0
        self.planned = len(config.operators) * len(config.seeds)
        self.current = ""

    def _require_same(self) -> dict[str, tuple[Any, Any]]:
        """Refuse to go on with a run of another command or with other trainings.

        Returns:
            The options that differ and may, the former value and the new one by name.
        """
        path = self.folder.path
        try:
            found = read_json(path / ENVIRONMENT)
            name = found.get("command") if isinstance(found, dict) else None
        except (ContentError, OSError):
            name = None
        if name != self.program:
            rule = f"be the folder of a run of {self.program}"
            raise checks.value_error("resume", rule, repr(str(path)))
        self.folder.history()
        stored = read_stored(path / CONFIG, self.config)
        return changes(stored, self.config, self.config.free)

    # What a training is.

    def network(self, operator: str) -> nn.Module:
        """Return an untrained network."""
        config = self.config
        return small_network(
            find_operator(operator), IMAGE_SIZE, CLASSES, config.widths, config.norm_momentum
        )

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Return a network's parameters with their largest learning rates."""
        return [{"params": list(network.parameters()), "lr": self.config.lr}]

    def task(
        self, operator: str, seed: int, after_epoch: Callable[[float], None] = lambda accuracy: None
    ) -> DigitsTask:
        """Return an untrained task, its weights decided by the seed."""
        split = load_split(seed, self.config.test_share)
        seed_all(seed)
        network = self.network(operator)
        return DigitsTask(self.config, network, self.groups(network), split, seed, after_epoch)

    def training(self, operator: str, seed: int) -> Path:
        """Return the folder of a training."""
        return self.folder.path / TRAININGS / f"{operator}_seed{seed}"

    def read_epochs(self, operator: str, seed: int) -> list[Epoch] | None:
        """Return the epochs of a finished training, None where there is none."""
        path = self.training(operator, seed)
        if not (path / METRICS).exists():
            return None
        if Checkpoints(path / "checkpoints").last_step != self.config.steps:
            return None
        # Where damage leaves a gap, the training is not finished, and the engine speaks of it.
        records = read_metrics(path / METRICS, lambda text: None)
        trained = {record["step"]: record for record in records if record["kind"] == TRAIN}
        tested = {record["step"]: record for record in records if record["kind"] == EVALUATE}
        epochs, seconds = [], 0.0
        for number in range(1, self.config.epochs + 1):
            step = number * self.config.batches
            if step not in trained or step not in tested:
                return None
            loss, accuracy = trained[step].get("loss"), tested[step].get("accuracy")
            step_seconds = trained[step].get("step_seconds")
            if loss is None or accuracy is None or step_seconds is None:
                return None
            seconds += step_seconds * self.config.batches
            epochs.append(Epoch(operator, seed, number, loss, accuracy, seconds))
        return epochs

    def measure(self, operator: str) -> tuple[int, int]:
        """Return the number of parameters, and the bytes kept for backward in a training step."""
        split = load_split(self.config.seeds[0], self.config.test_share)
        images = split.train_images[: self.config.batch_size]
        classes = split.train_classes[: self.config.batch_size]
        with torch.random.fork_rng(devices=[]):
            network = self.network(operator)
        kept = kept_bytes(
            lambda: F.cross_entropy(network(images), classes),
            exclude=(*network.parameters(), *network.buffers()),
        )
        return sum(parameter.numel() for parameter in network.parameters()), kept

    # What a run does.

    def resume_command(self) -> str:
        """Return the command that goes on with this run."""
        return f"{self.program} --resume {os.fspath(self.folder.path)}"

    def train(self, operator: str, seed: int, progress: Progress, bar: Any) -> int:
        """Do what is left of one training and return the engine's exit status."""

        def advance(accuracy: float) -> None:
            text = f"{operator}, seed {seed}: {accuracy:.1f} %"
            progress.update(bar, advance=1, description=text)

        folder = RunFolder.at(self.training(operator, seed), "out")
        before = Checkpoints(folder.checkpoints).last_step
        if before:
            progress.update(bar, advance=before // self.config.batches)
        # The engine's own lines would drown the bar; that of a training that goes on may warn.
        console = Console(quiet=not before, force_terminal=False, markup=False, highlight=False)
        trainer = _Training(
            self.task(operator, seed, advance),
            self.config.engine(seed),
            folder,
            console,
            device=CPU,
            program=self.resume_command(),
            facts={"operator": operator, "seed": seed},
        )
        return trainer.run()

    def train_all(self, progress: Progress, signals: StopSignals) -> int:
        """Train everything, operator by operator; return the exit status."""
        config = self.config
        bar = progress.add_task("", total=self.planned * config.epochs)
        for operator in config.operators:
            parameters, kept = self.measure(operator)
            last_epochs: list[Epoch] = []
            for seed in config.seeds:
                self.current = f"{operator}, seed {seed}"
                epochs = self.read_epochs(operator, seed)
                if epochs is not None:
                    progress.update(bar, advance=config.epochs)
                else:
                    if signals.received:
                        return exit_status(signals.received)
                    status = self.train(operator, seed, progress, bar)
                    if status != FINISHED:
                        return status
                    epochs = self.read_epochs(operator, seed)
                    if epochs is None:
                        got = repr(str(self.training(operator, seed) / METRICS))
                        raise checks.value_error("training", "have a log of every epoch", got)
                self.epochs += epochs
                last_epochs.append(epochs[-1])
                self.finished += 1
                self.rows[operator] = make_row(operator, parameters, kept, last_epochs)
                self.store("running")
            progress.console.print(f"{operator:<36} {accuracy_text(self.rows[operator])} %")
        progress.update(bar, description="trained")
        return FINISHED

    def store(self, status: str) -> None:
        """Write results and epochs so far."""
        self.folder.write(EPOCHS, "".join(json_line(asdict(e)) for e in self.epochs).encode())
        results = {
            "status": status,
            "finished_trainings": self.finished,
            "planned_trainings": self.planned,
            "rows": [asdict(row) for row in self.rows.values()],
        }
        self.folder.write_json(RESULTS, results)

    def draw(self) -> None:
        """Draw the run's figures."""
        figure = draw_curves(list(self.rows.values()), self.epochs, self.config.test_images)
        self.folder.write(CURVES, figure)

    def report(self, status: int) -> None:
        """Store the results, draw the figures and print the table."""
        words = {FINISHED: "finished", FAILED: "failed"}
        self.store(words.get(status, "interrupted"))
        if self.rows:
            self.console.print(table(list(self.rows.values())))
            self.draw()
        kept = f"{self.finished} of {self.planned} trainings finished and kept"
        if status == FAILED:
            self.console.print(f"Failed in {self.current}: {kept}")
        elif status != FINISHED:
            name = "Ctrl-C" if status == exit_status(signal.SIGINT) else "SIGTERM"
            self.console.print(
                f"Interrupted by {name}: {kept}. Resume with: {self.resume_command()}",
                soft_wrap=True,
            )
        self.console.print(f"Stored in {self.folder.path}", soft_wrap=True)

    def begin(self) -> None:
        """Store configuration, environment and source."""
        config = to_yaml(dataclasses.replace(self.config, resume=None))
        if self.config.resume is not None:
            differences = self._require_same()
            done = [
                self.read_epochs(o, s) for o in self.config.operators for s in self.config.seeds
            ]
            steps = self.config.steps * sum(epochs is not None for epochs in done)
            self.folder.restart(config, CPU, steps, differences)
            tidy_run(self.folder.path)
            return
        # The trainings are known to be of this configuration from its file on.
        facts = {"command": self.program, "backend": self.backend}
        self.folder.write_json(ENVIRONMENT, environment(CPU) | facts)
        self.folder.write(CONFIG, config.encode())
        self.folder.copy_source()

    def start(self) -> int:
        """Do the run and return the exit status of the process."""
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        config = self.config
        try:
            argument = "out" if config.resume is None else "resume"
            with owned(self.folder.path, argument, self.console.print), StopSignals() as signals:
                self.begin()
                self.console.print(
                    f"trainings: {self.planned}, epochs each: {config.epochs}, "
                    f"backend: {self.backend}, threads: {config.threads}"
                )
                with progress:
                    status = self.train_all(progress, signals)
                self.report(status)
        except OSError as error:
            rule = f"be a folder that takes the run '{self.folder.path}'"
            sys.stderr.write(f"{checks.value_error('out', rule, error.strerror or error)}\n")
            return FAILED
        return status


def launch(kind: type[Run], config: Config) -> int:
    """Do a whole run as a command and return its exit status."""
    torch.set_num_threads(config.threads)
    choice = nullcontext() if config.backend is None else dcconv.use_backend(config.backend)
    try:
        with choice:
            return kind(config, new_console()).start()
    except (NotImplementedError, TypeError, ValueError) as error:
        # Any other is a mistake in the program, and shows where.
        if not str(error).startswith("dcconv: "):
            raise
        sys.stderr.write(f"{error}\n")
        return REFUSED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.digits`` and return its exit status."""
    config = parse(
        Config,
        arguments,
        program=Run.program,
        description="Train a small decoupled network on handwritten digits, beside nn.Conv2d.",
        describe=Config.describe,
    )
    return launch(Run, config)


if __name__ == "__main__":
    sys.exit(main())
