"""Attack networks by operator: ``python -m train.robustness --preset digits``.

Trains a network for every operator, training and seed, attacks each, and prints the paper's
Tables 7 (white-box) and 8 (black-box). Results are stored after every network; ``--resume FOLDER``
goes on with the next, and in the middle of a training that was stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from dcconv.operator import checks
from train.data.cifar import Cifar, load_cifar
from train.data.stream import derive_seed
from train.engine import distributed
from train.engine.checkpoint import tidy_run
from train.engine.config import as_stored, changes, parse, read_stored, to_yaml
from train.engine.files import read_json
from train.engine.folder import CONFIG, RESULTS, RunFolder
from train.engine.loop import (
    FAILED,
    FINISHED,
    REFUSED,
    Trainer,
    UnsavedError,
    folder_argument,
    new_console,
    open_folder,
)
from train.engine.owner import owned
from train.engine.rng import seed_all
from train.engine.signals import StopSignals, exit_status
from train.engine.state import count, require
from train.robustness import attacks
from train.robustness.attacks import perturb
from train.robustness.options import PRESETS, RobustnessRun
from train.robustness.tables import Cell, markdown, report, rich_table
from train.robustness.training import (
    Problem,
    RobustTask,
    accuracy,
    cifar_problem,
    digits_problem,
)

PROGRAM = "python -m train.robustness"
TABLE = "table.md"
TRAININGS_FOLDER = "trainings"

# The substitute's weights and order come from another seed than those of the attacked networks.
SUBSTITUTE_SHIFT = 2**31
# Columns of the tables where the output has no width of its own.
WIDTH = 130


class _StopError(Exception):
    """The run ends early, with an exit status."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Training(Trainer):
    """A training that is resumed by resuming the whole run."""

    def how_to_resume(self) -> str:
        """Name the command and the folder of the whole run."""
        run = self.folder.path.parent.parent
        return f"What is finished is kept; resume with: {self.program} --resume {os.fspath(run)}"


def read_cells(folder: RunFolder) -> dict[tuple[str, str, int], Cell]:
    """Return the finished networks of a run, none of a new one.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder.path / RESULTS
    if not path.exists():
        return {}
    try:
        stored = [Cell(**cell) for cell in read_json(path)["cells"]]
        for cell in stored:
            require(cell.operator, str, "a network's operator")
            require(cell.training, str, "a network's training")
            count(cell.seed, "a network's seed")
            require(cell.white, dict, "a network's white")
            require(cell.black, dict, "a network's black")
            for value in (cell.clean, *cell.white.values(), *cell.black.values()):
                checks.number("accuracy", value, "be a number", 0.0, closed=True)
    except (KeyError, OSError, TypeError, ValueError) as error:
        got = f"'{path}' ({type(error).__name__}: {error})"
        raise checks.value_error("resume", f"have a readable {RESULTS}", got) from error
    return {cell.key: cell for cell in stored}


def require_same(
    folder: RunFolder, options: RobustnessRun
) -> tuple[RobustnessRun, dict[str, tuple[Any, Any]]]:
    """Require that a resumed run's networks would be trained and attacked as before.

    Returns:
        The options as they are kept, and those that differ and may, former and new value by name.
    """
    path = folder.path / CONFIG
    if not path.exists():
        if options.resume is not None:
            raise checks.value_error("resume", f"be a run with a {CONFIG}", repr(options.resume))
        return options, {}
    folder.history()
    stored = read_stored(path, options)
    return as_stored(stored, options), changes(stored, options, options.free)


class Run:
    """One run: trains and attacks every network and keeps what is finished on disk.

    Args:
        options: what to do.
        folder: of the run; its finished networks are not trained again.
        device: where to train.
        console: where to speak.
        cifar: the images, where they are not the digits.
    """

    def __init__(
        self,
        options: RobustnessRun,
        folder: RunFolder,
        device: torch.device,
        console: Console,
        cifar: Cifar | None = None,
    ) -> None:
        self.options = options
        self.folder = folder
        self.device = device
        self.console = console
        self.cells = read_cells(folder)
        self.signals = StopSignals()
        self.cifar = cifar
        self.plan = [
            (operator, training, seed)
            for seed in options.seeds()
            for operator in options.operators
            for training in options.trainings
        ]

    def finished(self) -> list[Cell]:
        """Return the networks of the plan that have every figure."""
        options = self.options
        found = (self.cells.get(key) for key in self.plan)
        return [
            cell
            for cell in found
            if cell is not None
            and set(options.attacks) <= set(cell.white)
            and (not options.black_box or set(options.attacks) <= set(cell.black))
        ]

    def store(self, status: str) -> None:
        """Write results and tables so far."""
        finished = self.finished()
        results = {
            "status": status,
            "finished": len(finished),
            "planned": len(self.plan),
            "attacks": {name: asdict(self.options.attack(name)) for name in self.options.attacks},
            "cells": [asdict(cell) for cell in self.cells.values()],
        }
        try:
            self.folder.write_json(RESULTS, results)
            if finished:
                self.folder.write(TABLE, markdown(self.options, finished).encode())
        except OSError as error:
            rule = "be a disk that takes the results"
            reason = error.strerror or error
            raise UnsavedError(str(checks.value_error("out", rule, reason))) from error

    def _check_stop(self) -> None:
        if self.signals.received:
            raise _StopError(exit_status(self.signals.received))

    def _problem(self, seed: int) -> Problem:
        if self.cifar is not None:
            problem = cifar_problem(self.options, self.cifar, self.device)
        else:
            problem = digits_problem(self.options, seed, self.device)
        most = self.options.images or len(problem.images)
        return replace(problem, images=problem.images[:most], classes=problem.classes[:most])

    def train(
        self, name: str, problem: Problem, operator: str, training: str, seed: int
    ) -> nn.Module:
        """Return a trained network in evaluation mode; what is on disk is not trained again."""
        self._check_stop()
        options = replace(self.options, seed=seed, repeats=1, resume=None, folder=None)
        seed_all(seed)
        task = RobustTask(options, problem, operator, seed, options.training_attack(training))
        # The bar is for a terminal; elsewhere a line per network is enough.
        quiet = Console(quiet=True)
        status = _Training(
            task,
            options,
            RunFolder.at(self.folder.path / TRAININGS_FOLDER / name),
            self.console if self.console.is_terminal else quiet,
            device=self.device,
            program=PROGRAM,
            facts={"operator": operator, "training": training},
        ).run()
        if status != FINISHED:
            raise _StopError(status)
        return task.network.eval()

    def attacked(
        self, network: nn.Module, problem: Problem, attack: str, seed: int, text: str
    ) -> Tensor:
        """Return the test images as an attack leaves them; the same for the same seed."""
        generator = torch.Generator().manual_seed(derive_seed(seed, 0))
        size = self.options.attack_batch
        parts = list(zip(problem.images.split(size), problem.classes.split(size), strict=True))
        moved = []
        hidden = not self.console.is_terminal
        with Progress(console=self.console, transient=True, disable=hidden) as progress:
            for images, classes in progress.track(parts, description=f"{text}: {attack}"):
                self._check_stop()
                how = self.options.attack(attack)
                moved.append(perturb(network, images, classes, how, generator))
        return torch.cat(moved)

    def _black_images(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        options = self.options
        if not options.black_box:
            return {}
        other = (seed + SUBSTITUTE_SHIFT) % 2**32
        name = f"substitute_{options.substitute}_{seed}"
        network = self.train(name, problem, options.substitute, "natural", other)
        return {
            attack: self.attacked(network, problem, attack, seed, name)
            for attack in options.attacks
        }

    def _measure(
        self, key: tuple[str, str, int], problem: Problem, black: dict[str, Tensor]
    ) -> Cell:
        operator, training, seed = key
        name = f"{operator}_{training}_{seed}"
        network = self.train(name, problem, operator, training, seed)
        batch = self.options.attack_batch

        def score(images: Tensor) -> float:
            return accuracy(network, images, problem.classes, batch)

        white = {
            attack: score(self.attacked(network, problem, attack, seed, name))
            for attack in self.options.attacks
        }
        return Cell(
            *key,
            clean=score(problem.images),
            white=white,
            black={attack: score(images) for attack, images in black.items()},
        )

    def _all(self) -> None:
        done = {cell.key for cell in self.finished()}
        for seed in self.options.seeds():
            keys = [key for key in self.plan if key[2] == seed and key not in done]
            if not keys:
                continue
            problem = self._problem(seed)
            black = self._black_images(problem, seed)
            for key in keys:
                cell = self._measure(key, problem, black)
                self.cells[key] = cell
                self.store("running")
                self._say(cell)

    def _say(self, cell: Cell) -> None:
        figures = [f"clean {cell.clean:.1f}"]
        for box, values in (("", cell.white), ("black-box ", cell.black)):
            figures += [f"{box}{attacks.labels[k]} {v:.1f}" for k, v in values.items()]
        self.console.print(
            f"{len(self.finished())}/{len(self.plan)} {cell.operator}, {cell.training} training, "
            f"seed {cell.seed}: {', '.join(figures)} %",
            soft_wrap=True,
        )

    def start(self) -> int:
        """Do the run and return its exit status: 0, 1 for an error, 130 or 143 for a signal."""
        status = FINISHED
        with self.signals:
            try:
                self._all()
            except _StopError as stop:
                status = stop.status
            self._finish(status)
        return status

    def _finish(self, status: int) -> None:
        words = {FINISHED: "finished", FAILED: "failed"}
        self.store(words.get(status, "interrupted"))
        cells = self.finished()
        if cells:
            made = report(self.options, cells)
            for title, rows in made.sections:
                self.console.print(rich_table(title, rows, self.options.operators))
            if made.sentence:
                self.console.print(made.sentence)
        path = self.folder.path
        if status != FINISHED:
            self.console.print(
                f"Stopped: {len(cells)} of {len(self.plan)} networks are finished and kept. "
                f"Resume with: {PROGRAM} --resume {path}",
                soft_wrap=True,
            )
        self.console.print(f"Stored in {path}", soft_wrap=True)


def one_process() -> None:
    """Refuse torchrun: networks are trained one after the other, each in one process."""
    count: Any = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        rule = "be 1: share the work by --operators, one command for each part"
        raise checks.value_error("number of processes", rule, count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.robustness`` and return its exit status."""
    options = parse(
        RobustnessRun,
        arguments,
        program=PROGRAM,
        description="Train networks naturally and adversarially, and attack them.",
        presets=PRESETS,
        describe=RobustnessRun.describe,
    )
    console = new_console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        one_process()
        device = distributed.choose_device(options.device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Before a folder is made for a run that cannot be.
        cifar = None
        if options.dataset == "cifar10":
            cifar = load_cifar(options.data, 10, verify=options.verify)
        folder = open_folder(options, f"robustness_{options.dataset}")
        with owned(folder.path, folder_argument(options), console.print):
            kept, differences = require_same(folder, options)
            run = Run(options, folder, device, console, cifar)
            if (folder.path / CONFIG).exists():
                folder.restart(to_yaml(kept), device, len(run.finished()), differences)
                tidy_run(folder.path)
            else:
                folder.start(to_yaml(options), device)
            return run.start()
    except UnsavedError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    except (NotImplementedError, TypeError, ValueError) as error:
        # Any other is a mistake in the program, and shows where.
        if not str(error).startswith("dcconv: "):
            raise
        sys.stderr.write(f"{error}\n")
        return REFUSED
