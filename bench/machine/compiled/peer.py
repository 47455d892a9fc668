"""The operator under torch.compile as a peer: seconds of its kernels, and what they move.

The best-written formula (bench/providers.py) of the default operator is compiled for some images;
the time of what goes over positions is proportional to them. Of Inductor's configurations of a
kernel the fastest counts, as if every one were measured. The library's convolutions are left out
here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cases import BATCH, Case, Operator
from bench.layers import Layer as Shape
from bench.machine.compiled.generate import generated
from bench.machine.compiled.kernels import STREAM_SHARE, predicted
from bench.machine.compiled.launches import Step, steps_of
from bench.machine.compiled.pretend import missing
from bench.machine.gpus import Gpu
from bench.machine.kept import kept_by
from bench.options import DTYPES
from dcconv.operator.checks import value_error

#: Images that a layer is compiled for.
IMAGES = 32

#: The default operator's functions; mode BATCH has the mean of this batch's norms.
OPERATOR = Operator("tanh", "cosine")


class Peer(NamedTuple):
    """What the compiled operator takes besides the library's convolutions.

    Attributes:
        forward, backward: seconds of kernels, launches apart.
        launches: of both.
        moved: bytes of tensors with the size of x or y that both read and write.
        steps: each kernel's figures.
    """

    forward: float
    backward: float
    launches: tuple[int, int]
    moved: tuple[int, int]
    steps: tuple[list[dict[str, Any]], list[dict[str, Any]]]


def _sources() -> str:
    found = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()


def _grows(step: Step, positions: int) -> bool:
    """Return whether a launch goes over positions, and not over filters or sums alone."""
    sizes = [value.numel() for value in step.arguments if isinstance(value, torch.Tensor)]
    return max(sizes) >= positions


def compiled_layer(shape: Shape, dtype: str, gpu: Gpu, first: bool = False) -> Peer:
    """Predict a layer under torch.compile.

    Args:
        shape: its sizes.
        dtype: of the tensors.
        gpu: which.
        first: whether x needs no gradient.

    Raises:
        ValueError: PyTorch or Triton is missing what it takes.
    """
    reason = missing()
    if reason is not None:
        raise value_error("torch.compile", "be able to write CUDA kernels", reason)
    import triton

    small = shape._replace(n=IMAGES)

    def make() -> dict[str, Any]:
        case = Case(small, OPERATOR, BATCH, dtype)
        n, o, p, q = small.y_shape
        elements = min(n * o * p * q, n * small.c * small.size**2)
        least = STREAM_SHARE * elements * DTYPES[dtype].itemsize
        passes: dict[str, Any] = {"forward": [], "backward": []}
        for module in generated(case, gpu, first):
            for step in steps_of(module, gpu):
                facts = {**asdict(predicted(step, gpu, least)), "grows": _grows(step, n * p * q)}
                passes["backward" if module.is_backward else "forward"].append(facts)
        return passes

    key = {
        **{"versions": [torch.__version__, triton.__version__], "sources": _sources()},
        **{"layer": small.name, "dtype": dtype, "gpu": asdict(gpu), "first": first},
    }
    found = kept_by(key, make)
    times = shape.n / IMAGES
    both = found["forward"], found["backward"]

    def seconds(steps: Iterable[dict[str, Any]]) -> float:
        return sum(float(s["seconds"]) * (times if s["grows"] else 1.0) for s in steps)

    def moved(steps: Iterable[dict[str, Any]]) -> int:
        return round(times * sum(int(s["read"]) + int(s["written"]) for s in steps))

    return Peer(
        *(seconds(both[0]), seconds(both[1]), (len(both[0]), len(both[1]))),
        *((moved(both[0]), moved(both[1])), both),
    )
