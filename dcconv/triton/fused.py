"""The strategy fused in Triton: one pass in depthwise layers and, as an implicit GEMM, in others.

The composition is that of :mod:`dcconv.passes.fused`, on Triton's ops.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dcconv.operator.records import Operands, Problem
from dcconv.passes import fused, records
from dcconv.passes.backward import InputSide

NAMESPACE = "dcconv_triton"

# The tile that Triton's autotuner finds to be the fastest, in the place of a tile's number.
AUTOTUNED = -2

# Windows of at most so many elements have their squares summed in the loop of the product, where
# no more than one tile of filters repeats them: 256 additions per window against a pass over x.
SHORT_WINDOW, FILTER_TILE = 256, 128


def kernel_of(weight: Tensor, problem: Problem) -> str:
    """Return the kernel that is made for a call's channels."""
    depthwise = problem.window.groups > 1 and weight.shape[1] == 1
    return records.DEPTHWISE if depthwise else records.IMPLICIT_GEMM


def why_not(operands: Operands, problem: Problem, direction: str = records.FORWARD) -> str | None:
    """Return None if a direction of a call has a kernel of its own, else one sentence why not."""
    window = problem.window
    if problem.operator.norm_free:
        return "norm-free operators are one library convolution"
    if direction == records.FORWARD or kernel_of(operands.weight, problem) == records.DEPTHWISE:
        return None
    if direction == records.WEIGHT_GRADIENT:
        return records.NO_WEIGHT_GRADIENT
    if window.padding_mode != "zeros":
        return f"its kernels pad with zeros, got padding_mode '{window.padding_mode}'"
    if window.stride != (1, 1):
        return f"the gradient of the input takes stride 1, got {window.stride}"
    return None


def _finds_norms(weight: Tensor, problem: Problem) -> bool:
    """Whether the kernel finds the norms itself: every square is taken once per tile of filters.

    So it is where windows do not overlap, and where they are so short that a pass over x for sums
    per pixel takes longer.
    """
    depthwise = kernel_of(weight, problem) == records.DEPTHWISE
    if depthwise or fused.single_pixels(weight, problem.window):
        return True
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return size <= SHORT_WINDOW and weight.shape[0] // problem.window.groups <= FILTER_TILE


def forward(
    operands: Operands,
    problem: Problem,
    kept: str,
    sums: Tensor | None = None,
    tile: int = records.OWN_RULE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator; results as of ``fused.forward``."""
    weight = operands.weight
    kernel, finds_norms = kernel_of(weight, problem), _finds_norms(weight, problem)
    return fused.compose(operands, problem, kept, kernel, finds_norms, sums, tile, NAMESPACE)


def input_gradient(side: InputSide, problem: Problem, tile: int = records.OWN_RULE) -> Tensor:
    """Return grad_x: the convolution's, and x times the window sums of the taps."""
    kernel = kernel_of(side.weight, problem)
    return fused.input_gradient(side, problem, kernel, tile, NAMESPACE)


weight_gradient = partial(fused.weight_gradient, namespace=NAMESPACE)
