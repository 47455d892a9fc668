"""The strategies on a GPU, each by itself: fused kernels, the tiles of Triton's, cuDNN graphs.

Other rows run by library (``DCCONV_STRATEGIES`` of the workers), so that a strategy that fails
spoils its own rows only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import OPERATORS, Case, Inputs
from cases import make_inputs as draw

from dcconv import backends
from gate.checks import Where, compare, tf32
from gate.report import Figures, NotRun

HALF = (torch.bfloat16, torch.float16)

# Tails of every tile: positions, filters and channels that do not fill one.
GEMM = (
    Case("1x1 expansion", 4, 64, 28, 28, 256, (1, 1)),
    Case("1x1 reduction", 4, 256, 28, 28, 64, (1, 1)),
    Case("1x1 tails", 3, 40, 7, 9, 72, (1, 1)),
    Case("1x1 stride 2", 2, 64, 15, 13, 136, (1, 1), stride=2),
    Case("1x1 groups", 2, 64, 9, 9, 48, (1, 1), groups=2),
    Case("3x3", 2, 64, 28, 28, 64, (3, 3), padding=1),
    Case("3x3 tails", 2, 24, 11, 7, 40, (3, 3), padding=1),
    Case("3x3 stride 2", 2, 32, 15, 15, 64, (3, 3), stride=2, padding=1),
    Case("3x3 dilation 2", 2, 16, 14, 14, 24, (3, 3), padding=2, dilation=2),
    Case("one position", 1, 64, 3, 3, 64, (3, 3)),
    Case("one pixel", 3, 64, 1, 1, 32, (1, 1)),
)
DEPTHWISE = (
    Case("depthwise 3x3", 4, 96, 28, 28, 96, (3, 3), padding=1, groups=96),
    Case("depthwise 3x3 stride 2", 2, 144, 15, 15, 144, (3, 3), stride=2, padding=1, groups=144),
    Case("depthwise 5x5", 2, 64, 14, 14, 64, (5, 5), padding=2, groups=64),
    Case("depthwise 7x7", 2, 96, 14, 14, 96, (7, 7), padding=3, groups=96),
    Case("depthwise dilation 2", 2, 32, 14, 14, 32, (3, 3), padding=2, dilation=2, groups=32),
    Case("depthwise odd channels", 2, 37, 9, 11, 37, (3, 3), padding=1, groups=37),
    Case("depthwise multiplier 3", 2, 16, 9, 11, 48, (3, 3), padding=1, groups=16),
)
STEM = (
    Case("stem 7x7 stride 2", 2, 3, 64, 64, 64, (7, 7), stride=2, padding=3),
    Case("stem 4x4 stride 4", 2, 3, 32, 32, 96, (4, 4), stride=4),
    Case("stem 3x3", 2, 3, 16, 17, 24, (3, 3), padding=1),
    Case("stem one channel", 2, 1, 16, 17, 40, (5, 5), padding=2),
)
CASES = {
    ("fused", "implicit GEMM"): GEMM,
    ("fused", "depthwise"): DEPTHWISE,
    ("fused", "stem"): STEM,
    ("graph", "cuDNN graph"): GEMM,
}


def _inputs(name: str, case: Case, dtype: torch.dtype) -> Iterator[tuple[str, str, object]]:
    """Every layout that the kernel takes, some operators and norms: label, layout, inputs."""
    layouts = (
        ("contiguous", "channels_last") if name in ("depthwise", "stem") else ("channels_last",)
    )
    for j, layout in enumerate(layouts):
        for step in range(3):
            at = 11 * sum(map(ord, case.id)) + 29 * j + 37 * step
            magnitude, weighting, angular = OPERATORS[at % len(OPERATORS)]
            if (magnitude, angular) == ("linear", "cosine"):
                magnitude = "log"  # norm-free operators are library's
            yield (
                f"{case.id} {layout} {magnitude} {weighting} {angular}",
                layout,
                draw(
                    case,
                    dtype,
                    magnitude=magnitude,
                    weighting=weighting,
                    angular=angular,
                    norm=("batch", "given", "none")[step],
                    bias=at % 4 == 0,
                ),
            )


def accuracy(where: Where, strategy: str, name: str, dtype: torch.dtype) -> Figures:
    """One kernel under the accuracy rule, y and all gradients.

    Raises:
        NotRun: the strategy refuses every call, with its sentence.
    """
    where.need_gpu("strategies")
    worst, compared, refused = 0.0, 0, ""
    with tf32(False), backends.strategies(strategy):
        for case in CASES[strategy, name]:
            for label, layout, inputs in _inputs(name, case, dtype):
                try:
                    worst = max(worst, compare(where, label, inputs, layout))
                except NotImplementedError as refusal:
                    refused = str(refusal)
                    continue
                compared += 1
    if not compared:
        raise NotRun(refused)
    return {"compared": compared, "error / limit": worst}


def _need_triton(where: Where) -> None:
    where.need_gpu("tiles of Triton's kernels")
    if where.backend != "triton":
        raise NotRun("tiles are chosen by number on the triton backend")


# Windows of pixels, of taps, and of taps that share steps of the loop.
TILED = ("1x1 tails", "3x3 tails", "stem 3x3")


def _tiled(dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, str, Inputs]]:
    for case in (case for case in (*GEMM, *STEM) if case.id in TILED):
        for layout in ("channels_last", "contiguous"):
            name = f"{case.id} {layout}"
            yield name, layout, draw(case, dtype, weighting="linear", norm="batch")


def triton_tiles(where: Where) -> Figures:
    """Every tile of the implicit GEMM under the accuracy rule, y and all gradients; and TF32."""
    _need_triton(where)
    from triton_checks.fused import fused_conv2d

    from dcconv.triton.tiles import TILES

    worst = 0.0
    with backends.use_backend("triton"):
        for number, tile in enumerate(TILES):
            for name, layout, inputs in _tiled():
                label = f"{name} {tuple(tile)}"
                worst = max(
                    worst, compare(where, label, inputs, layout, call=fused_conv2d, tile=number)
                )
        # TF32 has the 10 bits of float16.
        with tf32(True):
            for name, layout, inputs in _tiled(torch.float32):
                rule = torch.float16
                worst = max(worst, compare(where, name, inputs, layout, rule, call=fused_conv2d))
    return {"tiles": len(TILES), "error / limit": worst}


def triton_tuner(where: Where) -> Figures:
    """The tiles that Triton's autotuner chooses, in benchmark mode; how many it was asked for."""
    _need_triton(where)
    from dcconv.triton import tuning

    worst, before = 0.0, len(tuning._best)
    with backends.strategies("fused", input_gradient="fused"), backends.benchmarking():
        for name, layout, inputs in _tiled():
            worst = max(worst, compare(where, name, inputs, layout))
    found = len(tuning._best) - before
    assert found > 0, "nothing was tuned"
    return {"tuned": found, "error / limit": worst}
