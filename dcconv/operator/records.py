"""What a call is made of: three records, checked once, and the call's own facts.

``Operator`` has the names and numbers of the formula, ``Geometry`` says where windows lie in the
user's terms, and ``Window`` says it in pixels, for one image size; ``Operands`` are the tensors. A
``Problem`` is a call without its tensors: what a backend is asked about, and what an op receives.
Letters: n batch, c/h/w input, o filters, p/q output, r/s filter rows and columns, g groups.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dcconv.operator import checks
from dcconv.operator.functions import angulars, magnitudes, weightings
from dcconv.operator.numerics import ANGLE_DELTA, EPS, RADIUS_OFFSET, compute_dtype, constant
from dcconv.tracing import has_static_value, recording

NORM_NONE, NORM_BATCH, NORM_GIVEN = "none", "batch", "given"

#: r and k where a call names none.
RADIUS, CURVATURE = 1.0, 0.3


def is_norm_free(magnitude: str, angular: str, weighting: str) -> bool:
    """Whether the patch norm cancels: alpha b c = alpha u / a needs no norm at all."""
    plain = magnitude == "linear" and angular == "cosine"
    return plain and weightings[weighting].only_with is None


@dataclass(frozen=True)
class Operator:
    """The names and numbers of y = h(a, b) g(c): everything of an operator but its tensors.

    The one place of the defaults. Immutable and hashable; equal operators compute the same.

    Args:
        magnitude: h, a name in ``dcconv.functions.magnitudes``.
        angular: g, a name in ``dcconv.functions.angulars``.
        weighting: how the filter norm enters h, a name in ``dcconv.functions.weightings``.
        alpha: scale of h, a number above 0.
        beta: second slope of ``segmented`` and ``mix``, a number of at least 0.
        power: exponent of ``power``, a number of at least 1.
        eps: added to both sums of squares, a number above 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Source: Liu et al., Decoupled Networks, CVPR 2018; eps is the official code's.

    Example:
        >>> import dcconv
        >>> dcconv.Operator(magnitude="ball")
        Operator(magnitude='ball')
        >>> dcconv.Operator() == dcconv.Operator("tanh", "cosine", alpha=1)
        True
    """

    magnitude: str = "tanh"
    angular: str = "cosine"
    weighting: str = "none"
    alpha: float = 1.0
    beta: float = 0.5
    power: float = 2.0
    eps: float = EPS

    def __post_init__(self) -> None:
        """Check the fields, and make numbers of Python's own kind of them."""
        checks.functions(self.magnitude, self.angular, self.weighting)
        checks.number("alpha", self.alpha, "be a finite number above 0", 0.0)
        checks.number("beta", self.beta, "be a finite number of at least 0", 0.0, closed=True)
        checks.number("power", self.power, "be a finite number of at least 1", 1.0, closed=True)
        checks.number("eps", self.eps, "be a finite number above 0", 0.0)
        for name in ("alpha", "beta", "power", "eps"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def __hash__(self) -> int:
        """Return the hash of the fields, taken once: every call looks its operator up."""
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((*self.constants, self.eps))
            object.__setattr__(self, "_hash", found)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made: hashes of names differ between processes."""
        return Operator, (*self.constants, self.eps)

    def __repr__(self) -> str:
        """Show what differs from the defaults."""
        changed = self.changes()
        return f"Operator({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, by name."""
        own = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, usual) in own.items() if value != usual}

    def named(self) -> dict[str, Any]:
        """Return by name what the formula of this operator has in it."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("magnitude", "angular", "weighting", "alpha", "eps")
        }
        if "beta" in magnitudes[self.magnitude].formula:
            found["beta"] = self.beta
        if "power" in angulars[self.angular].formula:
            found["power"] = self.power
        return found

    @property
    def constants(self) -> tuple[str, str, str, float, float, float]:
        """Everything but eps, in the order of the ops' arguments."""
        return self.magnitude, self.angular, self.weighting, self.alpha, self.beta, self.power

    @property
    def uses_rho(self) -> bool:
        """Whether the operator has a radius."""
        return magnitudes[self.magnitude].uses_rho

    @property
    def uses_k(self) -> bool:
        """Whether the operator has a curvature."""
        return angulars[self.angular].uses_k

    @property
    def scales_with_weight(self) -> bool:
        """Whether s times a filter gives s times its output, as in a plain convolution."""
        return self.weighting == "linear" and self.angular == "cosine"

    @property
    def is_plain(self) -> bool:
        """Whether the operator is ``F.conv2d``: a plain layer may take its weight over."""
        return self.scales_with_weight and self.magnitude == "linear" and self.alpha == 1.0

    @property
    def norm_free(self) -> bool:
        """Whether the patch norm cancels: alpha b c = alpha u / a needs no norm at all."""
        return is_norm_free(self.magnitude, self.angular, self.weighting)


def changed(record: Any, name: str, value: Any) -> Any:
    """Return an ``Operator`` or ``Geometry`` with another value of one field, checked."""
    if isinstance(record, Operator):
        return replace(record, **{name: value})
    return Geometry(**{**record._asdict(), name: value})


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str


class Geometry(_Geometry):
    """Where windows lie, as a call or a layer says it.

    Args:
        stride, dilation: pixels, an integer or a pair (rows, columns).
        padding: pixels, an integer or a pair, ``valid``, or ``same``.
        groups: number of channel groups.
        padding_mode: one of ``checks.PADDING_MODES``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    __slots__ = ()

    def __new__(
        cls,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """Check the arguments."""
        checks.choice("padding_mode", padding_mode, checks.PADDING_MODES)
        return super().__new__(
            cls,
            checks.pair("stride", stride, 1),
            checks.padding_argument(padding),
            checks.pair("dilation", dilation, 1),
            checks.size("groups", groups, 1),
            padding_mode,
        )


# Records by what they were made of, with its types, so that True is not taken for 1. Emptied when
# full.
_MOST_RECORDS = 1024
_records: dict[tuple[Any, ...], Any] = {}


def _found(kind: type[Any], arguments: tuple[Any, ...]) -> Any:
    """Return a record of these arguments, the one that was made before where there is one."""
    if torch.compiler.is_compiling():
        return kind(*arguments)
    types: tuple[Any, ...] = tuple(map(type, arguments))
    if tuple in types:
        types = (*types, *[tuple(map(type, part)) for part in arguments if type(part) is tuple])
    key = arguments, types
    try:
        record = _records.get(key)
    except TypeError:  # a list, or something wrong
        return kind(*arguments)
    if record is None:
        record = kind(*arguments)
        if len(_records) >= _MOST_RECORDS:
            _records.clear()
        _records[key] = record
    return record


def operator_of(*arguments: Any) -> Operator:
    """Return the ``Operator`` of these arguments, checked once."""
    found: Operator = _found(Operator, arguments)
    if found.magnitude not in magnitudes or found.angular not in angulars:
        checks.functions(*arguments[:3])  # a function that has been taken back
    return found


def geometry_of(*arguments: Any) -> Geometry:
    """Return the ``Geometry`` of these arguments, checked once."""
    found: Geometry = _found(Geometry, arguments)
    return found


class Window(NamedTuple):
    """Where windows lie in images of one size, in the order of the ops' arguments.

    Attributes:
        stride, dilation: rows and columns, in pixels.
        padding: top, bottom, left, right, in pixels.
        groups: number of channel groups.
        padding_mode: one of ``checks.PADDING_MODES``.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def symmetric_zeros(self) -> bool:
        """Whether a library convolution takes this padding as it is."""
        top, bottom, left, right = self.padding
        if torch.compiler.is_compiling() and not (
            has_static_value(top + left) and has_static_value(bottom + right)
        ):
            return False  # a guard on the answer would bind sizes that are left open
        return self.padding_mode == "zeros" and top == bottom and left == right


class Learned(NamedTuple):
    """A radius as a layer learns it: r = raw^2 + 1e-4.

    Attributes:
        raw: [o].
    """

    raw: Tensor

    def value(self, dtype: torch.dtype) -> Tensor:
        """Return r in a dtype, differentiable; backward keeps raw as it is here."""
        # The square keeps its argument, and another may be loaded before backward.
        copy = torch.is_grad_enabled() or recording()
        raw = self.raw
        if not copy and raw.dtype == dtype and not torch.compiler.is_compiling():
            return raw.square().add_(RADIUS_OFFSET)
        # Programs that are recorded keep a cast that has nothing to do.
        raw = raw.to(dtype, copy=copy)
        offset: float = constant("RADIUS_OFFSET")
        return raw.square() + offset


class Problem(NamedTuple):
    """One call of the operator, tensors apart.

    Attributes:
        operator: what is computed.
        window: where.
        norm: ``none`` (rho = radius), ``batch`` (times this batch's mean norm) or ``given``.
        norm_grad: whether the gradient flows through the batch's mean norm.
        delta: floor of (1 - c)(1 + c) in angular derivatives.
        learned: whether the radius among the operands is the raw one of ``Learned``, for
            ``call.autograd`` to square.
    """

    operator: Operator = Operator()
    window: Window = Window()
    norm: str = NORM_NONE
    norm_grad: bool = True
    delta: float = ANGLE_DELTA[torch.float32]
    learned: bool = False


class Operands(NamedTuple):
    """The tensors of one call, after the checks.

    Attributes:
        x: [n, c, h, w].
        weight: [o, c / groups, r, s].
        bias: [o] or None.
        radius: [] or [o], compute dtype; None for operators without one.
        norm_mean: [], compute dtype; None unless ``Problem.norm`` is ``given``.
        k: [] or [o], compute dtype; None for operators without one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    radius: Tensor | None
    norm_mean: Tensor | None
    k: Tensor | None


def output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Return the number of windows along one axis: floor((padded - extent) / stride) + 1."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding of one axis: ceil(size / stride) outputs, extra at the end.

    At stride 1 this is PyTorch's ``same``, whatever the size. Other sizes may be symbols of a
    compiler: nothing is asked of them.
    """
    extent = dilation * (kernel - 1) + 1
    if extent == 1:
        return 0, 0
    # The last window begins with the last 1 to ``stride`` pixels.
    begun = 1 if stride == 1 else (size - 1) % stride + 1
    total = extent - begun
    if extent < stride:
        total = cast(int, torch.sym_max(total, 0))
    before = total // 2
    return before, total - before


def may_change(value: Tensor) -> bool:
    """Return whether a tensor that backward keeps may be written to before, without an error.

    Learned ones raise PyTorch's error then. ``torch.jit.trace`` compares what it records with and
    without gradients: there the answer is the same.
    """
    return (torch.is_grad_enabled() and not value.requires_grad) or recording()


def as_compute(value: Tensor | float | None, x: Tensor) -> Tensor | None:
    """Return a parameter as a tensor of x's device and compute dtype; None stays None.

    What is not learned, statistics above all, may change in place before backward, which keeps the
    value of its forward: a copy, but where no gradient is taken.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        changes = may_change(value)
        if changes and value.dim() == 0 and torch.compiler.is_compiling():
            # A sum of one. Compiled code saves the source of a copy and makes the copy in backward;
            # sums it keeps.
            return value.to(compute_dtype(x.dtype)).sum()
        dtype = compute_dtype(x.dtype)
        # Programs that are recorded keep the cast: their tensors may have another dtype later.
        if value.dtype == dtype and not torch.compiler.is_compiling() and not recording():
            return value.clone() if changes else value
        return value.to(dtype, copy=changes)
    return torch.full((), value, dtype=compute_dtype(x.dtype), device=x.device)


def knows_autocast(x: Tensor) -> bool:
    """Whether x's device knows autocast at all; meta does not, and asking it would raise."""
    return torch.amp.is_autocast_available(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for x's device."""
    if knows_autocast(x) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
