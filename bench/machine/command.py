"""The command line of ``python -m bench machine``."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.machine.gpus import GPUS, Gpu, gpu_named
from bench.machine.library import Library, built
from bench.machine.loops import Trip, trips
from bench.machine.pipes import costs_of
from bench.machine.tables import PASSES
from dcconv.operator.checks import integer, value_error

SHOWN = ("FMA", "HEAVY", "ALU", "HALF", "XU", "LSU", "BRANCH", "UNIFORM", "TENSOR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("--library", type=Path, help="with CUDA code; default: dcconv's own")
        sub.set_defaults(action_run=run)
        return sub

    loops = action("loops", "count the loops of kernels by pipe, without executing them", _loops)
    loops.add_argument("--kernel", default="", help="part of the kernels' names; default: all")
    loops.add_argument("--arch", help="architecture; default: the GPU's")
    loops.add_argument("--gpu", default="H200", help=f"one of {', '.join(GPUS)}; default: H200")
    loops.add_argument("--smallest", type=int, default=8, help="instructions of a loop that counts")
    loops.add_argument("--code", help="address of a loop's header: print its instructions")

    # Imported when they are run: the other sub-commands do without.
    def later(name: str, module: str = "actions") -> Callable[..., int]:
        def run_action(options: argparse.Namespace, console: Console) -> int:
            actions = importlib.import_module(f"bench.machine.{module}")
            status: int = getattr(actions, name)(options, console)
            return status

        return run_action

    own = "hold the model against kernels whose speed is known"
    action("check", own, later("check"))
    text = "execute and simulate the passes of a layer on GPUs"
    predict = action("predict", text, later("predictions"))
    predict.add_argument("--gpus", default="H200,A100,RTX4090", help=f"of {', '.join(GPUS)}")
    predict.add_argument("--dtypes", default="bfloat16,float16,float32", help="default: all three")
    predict.add_argument("--layouts", default="channels_last,contiguous", help="default: both")
    predict.add_argument("--passes", default=",".join(PASSES), help="default: all")
    predict.add_argument("--operators", help="by name, separated by semicolons; default: all six")
    layer = "channels, size, filters and window; default: 64,32,64,3"
    predict.add_argument("--layer", default="64,32,64,3", help=layer)
    predict.add_argument("--output", type=Path, help="append the rows here, for bench report")
    gemm = action("gemm", "execute and simulate tiles of the implicit GEMM", later("tiles"))
    gemm.add_argument("--gpus", default="H200,A100,RTX4090", help=f"of {', '.join(GPUS)}")
    gemm.add_argument("--output", type=Path, help="append the rows here, for bench report")
    text = "predict the convolution layers of networks, forward and backward, by strategy"
    network = action("network", text, later("network", "network_actions"))
    network.add_argument("--gpu", default="H200", help=f"of {', '.join(GPUS)}; default: H200")
    network.add_argument("--network", default="resnet50,resnet18", help="of bench's networks")
    network.add_argument("--batch", type=int, default=256, help="images; default: 256")
    network.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    network.add_argument("--operator", default="default", help="one of predict's")
    peer = "predict the best-written formula of the default operator under torch.compile, too"
    network.add_argument("--compiled", action="store_true", help=peer)
    network.add_argument("--output", type=Path, help="append the rows here, for bench report")
    text = "predict both strategies of every layer of the networks, for the package's rule"
    rule = action("rule", text, later("rule", "network_actions"))
    rule.add_argument("--gpus", default="H200,A100,RTX4090", help=f"of {', '.join(GPUS)}")
    rule.add_argument("--batch", type=int, default=256, help="images; default: 256")
    rule.add_argument("--output", type=Path, help="append the table's rows here")
    text = "execute kernels and compare their results with the emulated sources"
    agree = action("agree", text, later("agreement"))
    agree.add_argument("--archs", default="sm_90a,sm_80,sm_89", help="default: all that are known")
    small = "few launches, of float32 and bfloat16"
    agree.add_argument("--small", action="store_true", help=small)
    action("listing", "compile and disassemble what check needs", later("make_listing"))


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the chosen action."""
    status: int = options.action_run(options, console)
    return status


def _cells(trip: Trip) -> list[str]:
    return [
        "  " * trip.loop.depth + f"{trip.address:#x}",
        str(len(trip.loop.own)),
        f"{trip.shortest}-{trip.longest}",
        *(f"{trip.pipes.get(pipe, 0):.0f}" for pipe in SHOWN),
        str(trip.loads),
        str(trip.stores),
        "-" if trip.distance is None else str(trip.distance),
        f"{trip.busiest} {trip.cycles:.0f}",
        f"{trip.slots:.0f}" if trip.slots else "-",
        "-" if trip.share is None else f"{trip.share:.2f}",
    ]


def _loops(options: argparse.Namespace, console: Console) -> int:
    gpu: Gpu = gpu_named(options.gpu)
    arch = options.arch or gpu.arch
    costs_of(arch)
    integer("smallest", options.smallest, 1)
    if options.code is not None and not re.fullmatch(r"(0x)?[0-9a-f]+", options.code):
        raise value_error("code", "be a hexadecimal address", options.code)
    library = Library(options.library or built())
    for kernel in library.find(options.kernel, arch):
        found = trips(kernel, gpu, options.smallest)
        if options.code is not None:
            chosen = [trip for trip in found if trip.address == int(options.code, 16)]
            for trip in chosen:
                console.print(f"{kernel.name}, loop at {trip.address:#x}", markup=False)
                for n in sorted(trip.loop.body):
                    one = kernel.code[n]
                    boards = "".join("-" if b == 7 else str(b) for b in (one.written, one.read))
                    control = f"{one.stall:2d} {boards} {one.waits:06b}"
                    console.print(f"  {one.address:05x} {control} {one.text}", markup=False)
            continue
        table = Table(
            *("loop", "own", "way", *SHOWN, "loaded", "stored", "distance"),
            *("busiest", "slots", "over slots"),
            title=f"{kernel.name} ({arch}, {kernel.registers} registers, {gpu.name})",
            title_justify="left",
        )
        for trip in found:
            table.add_row(*_cells(trip))
        console.print(table)
    return 0
