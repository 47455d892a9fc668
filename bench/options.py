"""The options that the measuring sub-commands share, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.environment import RESULTS, Environment, environment, folder_name
from bench.records import Record, append
from bench.timing import Protocol, Stopwatch
from dcconv import backends
from dcconv.operator.checks import choice, integer, number, value_error
from train.engine.terminal import SpellingConsole

#: Exit status of an interrupted run, whose finished rows are kept.
INTERRUPTED = 130

DEVICES = ("cpu", "cuda")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

LAYOUTS: dict[str, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}

FORWARD, BACKWARD, BOTH = PASSES = ("fwd", "bwd", "fwd+bwd")

# The machine's load above which a run says that it is not alone.
BUSY_LOAD = 0.5


def names(text: str) -> list[str]:
    """Split ``a,b,c``; the type of every option that takes several names.

    Example:
        >>> names("fwd,bwd")
        ['fwd', 'bwd']
    """
    return [part for part in text.split(",") if part]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every measuring sub-command."""
    add = parser.add_argument
    add("--device", default=None, metavar="NAME", help="cpu or cuda (cuda where there is a GPU)")
    add("--threads", type=int, default=None, help="threads of PyTorch (all cores)")
    add("--dtype", type=names, dest="dtypes", metavar="A,B", help=", ".join(DTYPES))
    add("--backends", type=names, metavar="A,B", help=f"{', '.join(backends.names)} (the willing)")
    add("--quick", action="store_true", help="a small selection, under a minute on two cores")
    add("--rounds", type=int, help="least rounds of a row (cpu 7, cuda 25; quick 5)")
    add("--min-time", type=float, help="least seconds of a row (0.7; quick 0.2)")
    add("--worst", action="store_true", help="worst rows first")
    add("--results", type=Path, metavar="FOLDER", help="append rows here (bench/results/<device>)")
    add("--no-save", action="store_true", help="measure and print only")


def check_names(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Require known names.

    Raises:
        ValueError: there is an unknown one, or none at all; the message lists the known ones.
    """
    known, given = list(known), list(given)
    if not given:
        raise value_error(option, f"name one or more of {', '.join(known)}", "nothing")
    for name in given:
        choice(option, name, known)


def complete_common(options: argparse.Namespace) -> None:
    """Fill in the shared options that were not given, check them, and set PyTorch up.

    PyTorch gets its threads, and on CUDA float32 products of float32 precision: with the ten bits
    of TF32 nothing obeys the accuracy rule of float32.

    Raises:
        ValueError, TypeError: a value is wrong; the message says which and what is known.
    """
    has_gpu = torch.cuda.is_available()
    if options.device is None:
        options.device = "cuda" if has_gpu else "cpu"
    choice("--device", options.device, DEVICES)
    if options.device == "cuda" and not has_gpu:
        raise value_error("--device", "be cpu where PyTorch finds no GPU", "'cuda'")
    if options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.dtypes is not None:
        check_names("--dtype", options.dtypes, DTYPES)
    if options.backends is not None:
        check_names("--backends", options.backends, backends.names)
    if options.threads is not None:
        integer("--threads", options.threads, 1)
        torch.set_num_threads(options.threads)
    if options.rounds is None:
        options.rounds = 5 if options.quick else 25 if options.device == "cuda" else 7
    if options.min_time is None:
        options.min_time = 0.2 if options.quick else 0.7
    integer("--rounds", options.rounds, 1)
    number("--min-time", options.min_time, "be a number of at least 0", 0.0, closed=True)
    if options.results is not None and options.results.exists() and not options.results.is_dir():
        raise value_error("--results", "be a folder", repr(str(options.results)))


def protocol(options: argparse.Namespace) -> Protocol:
    """Return the timing protocol that was asked for."""
    return Protocol(options.rounds, options.min_time, warmup=3 if options.device == "cuda" else 1)


def stopwatch(options: argparse.Namespace, ahead: bool = True) -> Stopwatch:
    """Return the stopwatch of the device."""
    return Stopwatch(options.device, getattr(options, "graphs", False), ahead)


def willing_backends(device: str) -> list[str]:
    """Return the backends that run calls on a device, in order of preference; not the reference."""
    x = torch.zeros(1, device=device)
    return [b for b in backends.names if b != "reference" and backends.why_not(b, x) is None]


class Sink:
    """Where rows go: every finished one is on disk before the next begins.

    Args:
        kind: of the records, and the name of the file.
        options: completed ones.
        console: gets the sentence about the machine.
    """

    def __init__(self, kind: str, options: argparse.Namespace, console: Console) -> None:
        self.at: Environment = environment(options.device)
        self.records: list[Record] = []
        folder = options.results or RESULTS / folder_name(self.at)
        self.path = None if options.no_save else folder / f"{kind}.jsonl"
        console.print(self.at.sentence, markup=False, highlight=False)
        if self.at.load > BUSY_LOAD:
            console.print("The machine is not idle: expect a large spread.", style="yellow")
        if self.at.cores < self.at.threads:
            console.print(f"{self.at.threads} threads share {self.at.cores} cores.", style="yellow")

    def add(self, record: Record) -> None:
        """Keep a finished row."""
        self.records.append(record)
        if self.path is not None:
            append(self.path, record, self.at)


def progress_bar() -> Progress:
    """Return the progress bar of a run: on stderr, since stdout may go to a file."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=SpellingConsole(stderr=True),
        transient=True,
    )
