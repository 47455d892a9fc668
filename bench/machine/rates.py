"""Seconds that the package's own kernels take for a layer on a GPU, from executed machine code.

Every kernel is executed with the layer's own channels, filters, window and stride, on few and small
images: what it takes is proportional to their pixels. Figures are kept by the kernel's machine code
(bench/machine/kept.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench.machine.capture import Emulator
from bench.machine.fused import GEMM, GEMM_GRADIENT, TILES, Case
from bench.machine.gemm import STEP, predict_gemm
from bench.machine.gpus import Gpu
from bench.machine.kept import kept
from bench.machine.layers import Call, Layer, Operands, Operator, aligned
from bench.machine.library import Library
from bench.machine.predict import launch_of, run_call
from dcconv.passes.backward import BLOCKS_PER_MULTIPROCESSOR

STEM, WINDOW_NORM = "stem", "window_norm"

#: Passes that go over pixels of x; the others go over positions of y.
OVER_PIXELS = ("pixel_sumsq", "grad_input")

#: Sides of the images that kernels are executed with: the next one above a layer's own, or the
#: largest. Powers of two give every block the same work.
SIDES = (8, 16, 32)

#: Positions of the smaller of both executions, at least: some for every warp of a multiprocessor.
#: Passes over maps have a thread for each.
POSITIONS, MAP_POSITIONS = 512, 2048

#: Blocks of a launch that write partial sums, at most.
SUMS = 64


def small_layer(layer: Layer, positions: int) -> Layer:
    """Return the layer with images that are executed instead of its own.

    Example:
        >>> small_layer(Layer(256, 64, 56, 128, 3, 2), 512)
        Layer(n=2, c=64, size=32, o=128, kernel=3, stride=2)
    """
    side = next((side for side in SIDES if side >= layer.size), SIDES[-1])
    one = replace(layer, n=1, size=side)
    return replace(one, n=max(2, -(-positions // one.positions)))


class Rates:
    """Figures of one GPU, dtype and operator, for channels_last tensors.

    Args:
        emulator, library: host code for the CPU, and kernels.
        gpu: which.
        dtype: of the tensors.
        operator: its functions.
    """

    def __init__(
        self, emulator: Emulator, library: Library, gpu: Gpu, dtype: str, operator: Operator
    ) -> None:
        self.emulator, self.library, self.gpu = emulator, library, gpu
        self.dtype, self.operator = dtype, operator

    def _call(self, function: str, layer: Layer) -> Call:
        if function == STEM:
            sizes = (layer.n, layer.c, layer.size, layer.o, layer.kernel, layer.stride)
            mean, operator = self.operator.mean, self.operator
            case = Case(STEM, self.dtype, True, *sizes, given=mean, operator=operator)
            # Windows overlap: most of what is read of x lies in L1 and L2.
            return Call(STEM, case.operands(self.emulator.module), ("y",))
        operands = Operands(self.emulator.module, layer, self.dtype, True, self.operator)
        if function == WINDOW_NORM:
            members = {
                **{"n": layer.n, "groups": 1, "window": layer.window(), "channels_last": True},
                **{"eps": 1e-4, "sums": operands.positive(layer.inputs, float(layer.c))},
                **{"b": aligned(layer.positions, np.float32)},
                **{"block_sums": aligned(SUMS, np.float64)},
            }
            return Call(WINDOW_NORM, members, ("b",))
        return operands.calls(BLOCKS_PER_MULTIPROCESSOR)[function]

    def pass_figures(self, function: str, layer: Layer) -> dict[str, Any]:
        """Return the cycles of a multiprocessor for a pixel or position, and DRAM's share.

        Args:
            function: a pass, ``window_norm`` or ``stem``.
            layer: its n does not count.
        """
        over_map = function == WINDOW_NORM
        few = small_layer(layer, MAP_POSITIONS if over_map else POSITIONS)
        many = replace(few, n=2 * few.n)
        call = self._call(function, few)
        kernel = self.library.kernel(
            launch_of(self.emulator, self.dtype, call).symbol, self.gpu.arch
        )

        def make() -> Mapping[str, Any]:
            at = self.gpu.latency[2]
            runs = [
                run_call(self.emulator, self.library, self.gpu, self.dtype, one, (at,)).simulated[
                    at
                ]
                for one in (call, self._call(function, many))
            ]
            cycles = runs[1].cycles - runs[0].cycles
            moved = runs[1].dram_bytes - runs[0].dram_bytes
            units = few.inputs if function in OVER_PIXELS else few.positions
            share = moved / cycles / self.gpu.bytes_per_cycle
            return {"kernel": kernel.name, "cycles": cycles / units, "bandwidth": share}

        asked = {
            **{"gpu": asdict(self.gpu), "function": function, "dtype": self.dtype},
            **{"layer": asdict(few), "operator": self.operator._asdict()},
        }
        return kept(kernel, asked, make)

    def seconds(self, function: str, layer: Layer) -> float:
        """Return what a pass takes for all of a layer, besides its launch."""
        units = layer.inputs if function in OVER_PIXELS else layer.positions
        cycles = float(self.pass_figures(function, layer)["cycles"])
        return units * cycles / self.gpu.sms / self.gpu.clock

    def _case(self, function: str, layer: Layer, tile: int = -1) -> Case:
        sizes = (1, layer.c, layer.size, layer.o, layer.kernel, layer.stride)
        return Case(function, self.dtype, True, *sizes, tile=tile, operator=self.operator)

    def gemm_launch(self, function: str, layer: Layer) -> tuple[int, int]:
        """Return the tile that the package takes for a layer on this GPU, and its blocks."""

        def launched(tile: int) -> tuple[str, tuple[int, int]]:
            # A launch that does not run reads no tensor: those of one image stand for all.
            members = self._case(function, layer, tile).operands(self.emulator.module)
            call = Call(function, {**members, "n": layer.n}, ())
            launch = launch_of(self.emulator, self.dtype, call, self.gpu.sms)
            return launch.symbol, launch.grid

        symbol, grid = launched(-1)
        tile = next(tile for tile in TILES if launched(tile)[0] == symbol)
        return tile, grid[0] * grid[1]

    def tile_figures(self, function: str, window: int, tile: int) -> dict[str, Any]:
        """Return what ``gemm`` predicts of a tile: cycles of a step, and of all else."""
        kind = "gradient" if function == GEMM_GRADIENT else "forward"
        problem = f"{kind} {'1x1' if window == 1 else '3x3'}"
        # Single pixels' norms are found on the way, unless their mean is needed first.
        finds = problem == "forward 1x1" and not self.operator.mean
        if finds:
            problem += ", norms in the loop"
        case = self._case(function, Layer(1, 64, 8, 64, window), tile)._replace(given=not finds)
        call = Call(function, case.operands(self.emulator.module), ())
        kernel = self.library.kernel(
            launch_of(self.emulator, self.dtype, call).symbol, self.gpu.arch
        )

        def make() -> Mapping[str, Any]:
            found = predict_gemm(
                *(self.emulator, self.library, self.gpu, self.dtype, problem, tile, self.operator)
            )
            return found.row()

        asked = {
            **{"gpu": asdict(self.gpu), "problem": problem, "tile": tile, "dtype": self.dtype},
            "operator": self.operator._asdict(),
        }
        return kept(kernel, asked, make)

    def gemm_seconds(self, function: str, layer: Layer) -> float:
        """Return what the implicit GEMM takes for all of a layer, besides its launch.

        Blocks come in waves of as many as the GPU holds. Those of the last wave share a
        multiprocessor with fewer, and one that is alone takes more than its share of a full one.
        """
        tile, blocks = self.gemm_launch(function, layer)
        figures = self.tile_figures(function, layer.kernel, tile)
        depth = layer.o if function == GEMM_GRADIENT else layer.c
        steps = layer.kernel**2 * -(-depth // STEP)
        block = figures["fixed"] + steps * figures["step"]
        cycles = block * waves(blocks, self.gpu.sms, figures["resident"], figures["alone"])
        return float(cycles / self.gpu.clock)


def waves(blocks: int, multiprocessors: int, resident: int, alone: float) -> float:
    """Return the time of a launch, in a block's share of a full multiprocessor's time.

    Example:
        >>> waves(blocks=8, multiprocessors=2, resident=2, alone=1.5)
        4
        >>> waves(9, 2, 2, 1.5), waves(11, 2, 2, 1.5), waves(1, 2, 2, 1.5)
        (5.5, 6, 1.5)
    """
    full, rest = divmod(blocks, multiprocessors * resident)
    last = max(-(-rest // multiprocessors), alone) if rest else 0
    return full * resident + last


__all__ = ["GEMM", "GEMM_GRADIENT", "STEM", "WINDOW_NORM", "Rates", "small_layer", "waves"]
