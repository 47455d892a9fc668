"""What a call costs beyond its arithmetic: layers so small that no kernel takes any time.

A layer of 8 channels on 4x4 pixels, beside ``F.conv2d`` and ``nn.Conv2d`` on the same tensors, in
one interleaved run. Forms: the functional with a given mean norm, the layer in evaluation, and the
layer in training, whose mean norm is the batch's and whose average is updated. Printed are the
medians in microseconds of a call and what dcconv's takes more.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.options import BOTH, FORWARD, Sink, add_common, complete_common, protocol, stopwatch
from bench.records import Record
from bench.timing import Candidate
from dcconv import DecoupledConv2d, decoupled_conv2d

CHANNELS, PIXELS, KERNEL = 8, 4, 3
# Calls of one sample: a single one is near the resolution of the clock.
REPEATS = 20

#: The providers of a row.
PLAIN, OWN = "plain", "dcconv"

FUNCTIONAL, EVALUATION, TRAINING = FORMS = ("functional", "evaluation", "training")


def callables(form: str, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the plain and the decoupled call of a form as functions of x."""
    torch.manual_seed(0)
    arguments = (CHANNELS, CHANNELS, KERNEL)
    own = DecoupledConv2d(*arguments, padding=1, device=device)
    plain = nn.Conv2d(*arguments, padding=1, bias=False, device=device)
    if form != FUNCTIONAL:
        for layer in (own, plain):
            layer.train(form == TRAINING)
        return {PLAIN: plain, OWN: own}
    weight = own.weight
    radius = torch.ones(CHANNELS, device=device)
    mean = torch.tensor(8.0, device=device)
    return {
        PLAIN: lambda x: F.conv2d(x, weight, padding=1),
        OWN: lambda x: decoupled_conv2d(x, weight, padding=1, radius=radius, norm_mean=mean),
    }


def candidate(call: Callable[[Tensor], Tensor], which: str, device: str) -> Candidate:
    """Return what a sample runs: ``REPEATS`` calls, without gradients or with a backward each."""
    x = torch.randn(1, CHANNELS, PIXELS, PIXELS, device=device, requires_grad=which == BOTH)
    grad_y = torch.ones(1, CHANNELS, PIXELS, PIXELS, device=device)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(REPEATS):
                call(x)

    def both() -> None:
        for _ in range(REPEATS):
            call(x).backward(grad_y)

    return both if which == BOTH else forward


def table_of(records: list[Record]) -> Table:
    """Return the figures of all rows."""
    table = Table("call", "pass", box=box.SIMPLE)
    for heading in ("plain us", "dcconv us", "more us", "times"):
        table.add_column(heading, justify="right")
    for record in records:
        plain, own = (1e3 * (record.median(name) or 0.0) for name in (PLAIN, OWN))
        table.add_row(
            str(record.row["call"]),
            str(record.row["pass"]),
            f"{plain:.1f}",
            f"{own:.1f}",
            f"{own - plain:.1f}",
            f"{own / plain:.2f}",
        )
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    add_common(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, keep and print every row; return 0."""
    complete_common(options)
    sink = Sink("calls", options, console)
    watch, timing = stopwatch(options, ahead=False), protocol(options)
    for form in FORMS:
        for which in (FORWARD, BOTH):
            calls = callables(form, options.device)
            candidates = {n: candidate(call, which, options.device) for n, call in calls.items()}
            found = watch.interleave(candidates, timing)
            results = {
                name: {
                    "timing": {
                        part: value if part == "rounds" else value / REPEATS
                        for part, value in dataclasses.asdict(measured).items()
                    }
                }
                for name, measured in found.items()
            }
            row = {"call": form, "pass": which, "threads": torch.get_num_threads()}
            sink.add(Record("calls", row, results, {"own": OWN}))
    console.print(table_of(sink.records))
    return 0
