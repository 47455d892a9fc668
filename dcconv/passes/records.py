"""One record per op: its arguments, in the order of its schema.

What each means, and what each result holds, stands in ``csrc/schemas.h`` and ``csrc/ops.cpp``. A
record inside another has its fields in its place. ``dcconv.passes.op`` writes schemas from the
records, and is the only place that lays them out as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeAlias

from torch import Tensor

from dcconv.operator.records import Operands, Problem, Window

#: What a call can be asked for.
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = DIRECTIONS

#: What backward keeps of the result: y, u, or neither; ``kept_is`` of ops.
OUTPUT, DOT, NOTHING = "output", "dot", "nothing"

#: Namespace of the compiled library's ops.
COMPILED = "dcconv"

# Bits of the ``needs`` argument: gradients of the operands, in the order of ``Operands``.
NEEDS_X, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RADIUS, NEEDS_NORM_MEAN, NEEDS_K = (
    1 << i for i in range(6)
)

# Bits of the ``sums`` argument: per-filter sums over all positions, of dy g h_rho, dy g h_a,
# dy h g_k and dy.
SUM_RHO, SUM_A, SUM_K, SUM_BIAS = (1 << i for i in range(4))

#: Why the gradient of a weight has no kernel of its own.
NO_WEIGHT_GRADIENT = "the gradient of the weight is the library's, but for depthwise layers"

#: Names of the kernels that take a whole direction in one pass.
DEPTHWISE, STEM, IMPLICIT_GEMM = "depthwise", "stem", "implicit_gemm"

#: In the place of a tile's number: let the kernel choose.
OWN_RULE = -1

#: Rows and columns.
Pair: TypeAlias = Sequence[int]
#: An integer that is no size: bits, or the number of a tile.
Code = Annotated[int, "int"]


class Functions(NamedTuple):
    """The names and numbers of h and g, as of ``Operator``."""

    magnitude: str
    angular: str
    weighting: str
    alpha: float
    beta: float
    power: float


def functions(problem: Problem) -> Functions:
    """Return the functions of a call."""
    return Functions(*problem.operator.constants)


class Parameters(NamedTuple):
    """What h and g are given per call or filter: [] or [o], the mean []; None where there is none.

    ``mean`` is the factor of the radius, absent for 1.
    """

    radius: Tensor | None
    mean: Tensor | None
    k: Tensor | None


class Taps(NamedTuple):
    """What output positions say about the norms of their windows: t, or t + sigma / b.

    ``norm_map`` is b. ``sigma`` is what the mean norm adds, absent for 0.
    """

    t: Tensor
    norm_map: Tensor
    sigma: Tensor | None


class ConvForward(NamedTuple):
    """The operator, by one op."""

    operands: Operands
    window: Window
    functions: Functions
    eps: float
    delta: float
    norm: str
    keep_dot: bool
    keep_map: bool = True
    sums: Tensor | None = None


class ConvBackward(NamedTuple):
    """Its gradients, by one op."""

    grad_y: Tensor
    x: Tensor
    weight: Tensor
    kept: Tensor
    norm_map: Tensor
    mean: Tensor
    radius: Tensor | None
    norm_mean: Tensor | None
    k: Tensor | None
    window: Window
    functions: Functions
    eps: float
    delta: float
    norm: str
    norm_grad: bool
    kept_is: str
    needs: Code


class WindowNorm(NamedTuple):
    """The patch norm."""

    x: Tensor
    kernel_size: Pair
    window: Window
    eps: float


class WindowNormGrad(NamedTuple):
    """Its gradient."""

    grad_b: Tensor
    x: Tensor
    b: Tensor
    kernel_size: Pair
    window: Window


class Norms(NamedTuple):
    """The norms of filters and of windows, and the mean of the latter with ``batch_mean``.

    ``sums`` are those of the squares of x per pixel and group, where they are known.
    """

    x: Tensor
    weight: Tensor
    window: Window
    eps: float
    batch_mean: bool
    channels_last: bool
    sums: Tensor | None = None


class Epilogue(NamedTuple):
    """The pass from u to y."""

    u: Tensor
    a: Tensor
    map: Tensor
    bias: Tensor | None
    parameters: Parameters
    input_size: Pair
    kernel_size: Pair
    window: Window
    functions: Functions
    delta: float
    eps: float
    map_is_norm: bool
    channels_last: bool


class GradDot(NamedTuple):
    """The pass over dy."""

    grad_y: Tensor
    kept: Tensor
    norm_map: Tensor
    a: Tensor
    parameters: Parameters
    groups: int
    functions: Functions
    delta: float
    kept_is: str
    wants_t: bool
    sums: Code
    rows: int
    channels_last: bool


class GradFilters(NamedTuple):
    """The filter side of backward."""

    parts: Tensor
    library_grad: Tensor | None
    weight: Tensor
    a: Tensor
    parameters: Parameters
    map_count: int
    sums: Code
    barrier: bool
    needs: Code


class GradInput(NamedTuple):
    """The pass that finishes grad_x. In place ``library_grad`` is of x's size: not ``padded``."""

    library_grad: Tensor
    x: Tensor
    taps: Taps
    kernel_size: Pair
    window: Window
    padded: bool
    channels_last: bool


class FilterScale(NamedTuple):
    """The filters of a norm-free operator."""

    weight: Tensor
    alpha: float
    eps: float
    divide: bool


class FilterScaleGrad(NamedTuple):
    """Their gradient."""

    library_grad: Tensor
    weight: Tensor
    a: Tensor
    alpha: float
    divide: bool


class FilterNorm(NamedTuple):
    """The norms of filters alone."""

    weight: Tensor
    eps: float


class AffineRelu(NamedTuple):
    """The affine map of channels with a ReLU behind it, and the sums of squares of its result."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    groups: int
    channels_last: bool


class OnePass(NamedTuple):
    """The operator in one pass."""

    x: Tensor
    weight: Tensor
    a: Tensor
    map: Tensor | None
    bias: Tensor | None
    parameters: Parameters
    window: Window
    functions: Functions
    delta: float
    eps: float
    map_is_norm: bool
    keep_norm: bool
    keep_dot: bool
    kernel: str
    tile: Code
    channels_last: bool


class OnePassGradInput(NamedTuple):
    """The gradient of x in one pass."""

    grad_u: Tensor
    weight: Tensor
    x: Tensor
    taps: Taps
    window: Window
    kernel: str
    tile: Code
    channels_last: bool


class DepthwiseGradWeight(NamedTuple):
    """The gradient of a depthwise weight."""

    grad_u: Tensor
    x: Tensor
    kernel_size: Pair
    window: Window
    rows: int
    weight_channels_last: bool
    channels_last: bool
