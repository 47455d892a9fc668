"""The actions of the command that execute or simulate."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.environment import RESULTS, environment
from bench.machine import agree, listing, selfcheck
from bench.machine.capture import Emulator, emulator_file
from bench.machine.disassemble import Kernel, find_tool
from bench.machine.fused import GEMM, GEMM_GRADIENT, TILES
from bench.machine.gemm import PROBLEMS, predict_gemm
from bench.machine.gpus import DRAM_LATENCIES, DRAM_LATENCY, gpu_named
from bench.machine.layers import LAYOUTS, OPERATORS, STORAGE, Layer
from bench.machine.library import Library, built
from bench.machine.predict import Prediction, predict
from bench.machine.tables import KIND, PASSES
from bench.options import names
from bench.records import Record, append
from dcconv.operator.checks import choice, value_error

#: Where predictions are kept.
PREDICTIONS = RESULTS / "machine" / "predictions.jsonl"

#: Passes that no function of the operator reaches: the sums of squares, the affine map, and the
#: gradient of x, to which the mean norm of the batch adds a term.
OF_ANY = {
    "pixel_sumsq": ("default",),
    "affine_relu": ("default",),
    "grad_input": ("default", "tanh, one radius"),
}


def check(options: argparse.Namespace, console: Console) -> int:
    """Hold the model against kernels whose speed is known; 1 if one is further off than allowed."""
    table = Table("kernel", "predicted", "known", "off by", "allowed")
    wrong = 0
    for one in selfcheck.checks():
        off = one.predicted / one.known - 1
        cells = (f"{one.predicted:.2f}", f"{one.known:.2f}", f"{off:+.1%}", f"{one.tolerance:.0%}")
        table.add_row(one.name, *cells, style=None if one.holds else "red")
        wrong += not one.holds
    console.print(table)
    return int(wrong > 0)


def _layer(text: str) -> Layer:
    parts = names(text)
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise value_error("layer", "be channels, size, filters and window, as 64,32,64,3", text)
    c, size, o, kernel = map(int, parts)
    return Layer(1, c, size, o, kernel)


def _rows(options: argparse.Namespace) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield GPU, dtype, layout, pass and operator of every prediction that is asked for."""
    operators = list(OPERATORS) if options.operators is None else options.operators.split(";")
    asked = {
        "gpu": (names(options.gpus), None),
        "dtype": (names(options.dtypes), STORAGE),
        "layout": (names(options.layouts), LAYOUTS),
        "pass": (names(options.passes), PASSES),
        "operator": (operators, OPERATORS),
    }
    for argument, (values, known) in asked.items():
        for value in values:
            if known is None:
                gpu_named(value)
            else:
                choice(argument, value, known)
    for gpu in asked["gpu"][0]:
        for layout in asked["layout"][0]:
            for dtype in asked["dtype"][0]:
                for function in asked["pass"][0]:
                    for operator in OF_ANY.get(function, operators):
                        yield gpu, dtype, layout, function, operator


def _shown(function: str, operator: str) -> str:
    return "any" if len(OF_ANY.get(function, ())) == 1 else operator


def predictions(options: argparse.Namespace, console: Console) -> int:
    """Predict passes, print a line of each, and append them to a file if one is named."""
    asked, layer = list(_rows(options)), _layer(options.layer)
    library, emulator = Library(options.library or built()), Emulator(every=True)
    at = replace(environment(), device="no GPU: predictions", device_type="none")
    for gpu, dtype, layout, function, operator in asked:
        found = predict(
            *(emulator, library, gpu_named(gpu), dtype, LAYOUTS[layout]),
            *(OPERATORS[operator], function, layer),
        )
        shown = _shown(function, operator)
        console.print(f"{gpu} {dtype} {layout} {shown}: {_line(found)}", markup=False)
        if options.output is not None:
            row = {
                **{"gpu": gpu, "dtype": dtype, "layout": layout, "function": function},
                **{"operator": shown, "layer": options.layer},
            }
            append(options.output, Record(KIND, row, {}, found.row()), at)
    return 0


def _line(p: Prediction) -> str:
    shares = ", ".join(f"{p.bandwidth[latency]:.2f} at {latency}" for latency in DRAM_LATENCIES)
    distance = "-" if p.distance is None else f"{p.distance:.0f}"
    return (
        f"{p.kernel}: {p.instructions:.0f} instructions for {p.slots:.0f} slots "
        f"({p.over_slots:.2f}), loads awaited after {distance}, "
        f"{p.in_flight / 1024:.1f} of {p.needed / 1024:.1f} KiB in flight at {DRAM_LATENCY}, "
        f"{p.resident} of {p.launched} blocks, bandwidth {shares}, {p.binds} binds"
    )


def tiles(options: argparse.Namespace, console: Console) -> int:
    """Predict tiles of the implicit GEMM; print a line of each, and append them to a file."""
    gpus = {name: gpu_named(name) for name in names(options.gpus)}
    library, emulator = Library(options.library or built()), Emulator(every=True)
    at = replace(environment(), device="no GPU: predictions", device_type="none")
    for name, gpu in gpus.items():
        for problem, (function, _, _) in PROBLEMS.items():
            # The gradient has no operator.
            operators = ("any",) if function == GEMM_GRADIENT else ("default", "tanh, one radius")
            for tile, (rows, columns) in TILES.items():
                for operator in operators:
                    functions = OPERATORS.get(operator, OPERATORS["default"])
                    found = predict_gemm(
                        *(emulator, library, gpu, "bfloat16", problem, tile, functions)
                    )
                    row = {
                        **{"gpu": name, "dtype": "bfloat16", "layout": "channels_last"},
                        **{"function": f"{GEMM} {problem}", "operator": operator},
                        "tile": f"{rows}x{columns}",
                    }
                    console.print(
                        f"{name} {problem}, {row['tile']}, {operator}: {found.step:.0f} cycles a "
                        f"step (tensor cores {found.tensor:.0f}, shared memory {found.shared:.0f}, "
                        f"schedulers {found.issue:.0f}, L2 {found.l2:.0f}), "
                        f"{found.teraflops:.0f} TFLOP/s, {found.fixed:.0f} more for a tile: "
                        f"{found.fixed_steps:.1f} steps",
                        markup=False,
                    )
                    if options.output is not None:
                        append(options.output, Record(KIND, row, {}, found.row()), at)
    return 0


def agreement(options: argparse.Namespace, console: Console) -> int:
    """Execute kernels and compare with the emulator; 1 if one does not agree."""
    library = Library(options.library or built())
    archs = names(options.archs)
    for arch in archs:
        library.names(arch)
    emulator, drive = Emulator(every=not options.small), emulator_file("drive")
    wrong = 0
    for arch in archs:
        comparison = agree.Comparison(emulator, library, arch)
        agree.compare_passes(comparison, drive, options.small, lambda case: None)
        if not options.small:
            agree.compare_fused(comparison, lambda case: None)
        found = comparison.findings
        wrong += sum(not finding.agrees for finding in found)
        for finding in found:
            if not finding.agrees:
                said = f"{finding.error:.3g} times what is allowed"
                console.print(f"{arch} {finding.kernel}, {finding.case}: {said}", markup=False)
        kernels = {finding.kernel for finding in found}
        worst = max((finding.error for finding in found), default=0.0)
        console.print(
            f"{arch}: {len(found)} launches of {len(kernels)} kernels, of "
            f"{len(library.names(arch))} in the library; largest difference {worst:.3f} of what is "
            "allowed"
        )
    return int(wrong > 0)


def make_listing(options: argparse.Namespace, console: Console) -> int:
    """Compile the kernels that the model is held against, and write their machine code."""
    kernels: list[Kernel] = []
    source = selfcheck.LISTING.with_name("kernels.cu")
    with tempfile.TemporaryDirectory() as folder:
        for arch in dict.fromkeys(gpu_named(name).arch for name in selfcheck.COPY_GPUS):
            cubin = Path(folder) / f"{arch}.cubin"
            flags: Sequence[str] = ("-std=c++17", "-O3", f"-arch={arch}", "-cubin")
            subprocess.run([find_tool("nvcc"), *flags, "-o", str(cubin), str(source)], check=True)
            found = Library(cubin).find("", arch)
            kernels += [k for k in found if k.name == "copy" or arch == gpu_named("H100").arch]
    selfcheck.LISTING.write_text(listing.write(kernels), encoding="utf-8")
    console.print(f"{selfcheck.LISTING}: {len(kernels)} kernels", markup=False)
    return 0
