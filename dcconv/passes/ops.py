"""The ops: each takes its record, in the namespace of whoever implements it.

A schema is written from the record, a record is laid out as arguments, and arguments are gathered
to a record again: here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, get_type_hints

import torch
from torch import Tensor

from dcconv.passes import records
from dcconv.passes.records import COMPILED

# What a field's type is called in a schema, where the type does not say it itself.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    tuple[int, int]: "SymInt[]",
    tuple[int, int, int, int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}

Record = TypeVar("Record")
Result = TypeVar("Result")
Two: TypeAlias = tuple[Tensor, Tensor]
Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Six: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Field(NamedTuple):
    name: str
    type: Any

    @property
    def fields(self) -> tuple[str, ...] | None:
        """Names of the fields of a record, None for what is none."""
        return getattr(self.type, "_fields", None)


def _fields(record: Any) -> list[_Field]:
    hints = get_type_hints(record, include_extras=True)
    return [_Field(name, hints[name]) for name in record._fields]


def _flattener(places: Sequence[int]) -> Callable[[Any], tuple[Any, ...]]:
    """Return what spreads the records at some places of a record, at most three, in one tuple."""
    if not places:
        return tuple
    if len(places) == 1:
        (i,) = places
        return lambda call: call[:i] + call[i] + call[i + 1 :]
    if len(places) == 2:
        i, j = places
        return lambda call: call[:i] + call[i] + call[i + 1 : j] + call[j] + call[j + 1 :]
    i, j, k = places
    return lambda call: (
        call[:i] + call[i] + call[i + 1 : j] + call[j] + call[j + 1 : k] + call[k] + call[k + 1 :]
    )


class Op(Generic[Record, Result]):
    """An op.

    Args:
        name: without its namespace.
        record: the class of its arguments.
        results: as its schema has them.
        writes: the argument that the result is written over, if it is.
        unset: a field of the record that is no argument, but always False.
    """

    def __init__(
        self, name: str, record: type[Record], results: str, writes: str = "", unset: str = ""
    ) -> None:
        self.name, self.writes, self._unset = name, writes, unset
        self._record, self._results = record, results
        fields = _fields(record)
        self._flat = _flattener([i for i, field in enumerate(fields) if field.fields])
        # Stretches of arguments, and the record that each is: None for fields of the op's own.
        self._stretches: list[tuple[int, int, Any]] = []
        start = end = 0
        for field in fields:
            if field.fields:
                after = end + len(field.fields)
                self._stretches += [(start, end, None), (end, after, field.type)]
                start = end = after
            else:
                end += 1
        self._stretches.append((start, end, None))
        names = [name for field in fields for name in field.fields or (field.name,)]
        self._place = names.index(unset) if unset else None
        self._overloads: dict[str, Any] = {}

    @property
    def schema(self) -> str:
        """The arguments and results of the op, after its name."""
        defaults = getattr(self._record, "_field_defaults", {})
        arguments = []
        for field in _fields(self._record):
            for name, kind in _fields(field.type) if field.fields else [field]:
                written = "(a!)" if name == self.writes else ""
                usual = f"={defaults[name]}" if name in defaults else ""
                if name != self._unset:
                    own = getattr(kind, "__metadata__", None)
                    type_name = own[0] if own else _TYPES[kind]
                    arguments.append(f"{type_name}{written} {name}{usual}")
        return f"({', '.join(arguments)}) -> {self._results}"

    def flat(self, call: Record) -> tuple[Any, ...]:
        """Return the arguments of a call, in schema order."""
        arguments = self._flat(call)
        if self._place is None:
            return arguments
        return (*arguments[: self._place], *arguments[self._place + 1 :])

    def record_of(self, *arguments: Any) -> Record:
        """Return the record of a call's arguments; those at the end may be left to defaults."""
        if self._place is not None:
            arguments = (*arguments[: self._place], False, *arguments[self._place :])
        fields: list[Any] = []
        for start, end, record in self._stretches:
            own = arguments[start:end]
            fields += own if record is None else (record(*own),)
        return self._record(*fields)

    def taking(self, function: Callable[[Record], Any]) -> Callable[..., Any]:
        """Return the function of arguments that calls a function of their record."""

        def run(*arguments: Any) -> Any:
            return function(self.record_of(*arguments))

        return run

    def bind(self, namespace: str) -> None:
        """Find the op of a namespace, which has it defined."""
        self._overloads[namespace] = getattr(getattr(torch.ops, namespace), self.name).default

    def __call__(self, call: Record, namespace: str = COMPILED) -> Result:
        """Run the op of a namespace."""
        result: Result = self._overloads[namespace](*self.flat(call))
        return result


conv2d_forward = Op[records.ConvForward, Four](
    "conv2d_forward",
    records.ConvForward,
    "(Tensor y, Tensor norm_map, Tensor mean, Tensor dot)",
)
conv2d_backward = Op[records.ConvBackward, Six](
    "conv2d_backward",
    records.ConvBackward,
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_radius, "
    "Tensor grad_norm_mean, Tensor grad_k)",
)
patch_norm_forward = Op[records.WindowNorm, Tensor](
    "patch_norm_forward", records.WindowNorm, "Tensor"
)
patch_norm_backward = Op[records.WindowNormGrad, Tensor](
    "patch_norm_backward", records.WindowNormGrad, "Tensor"
)
conv2d_norms = Op[records.Norms, Three](
    "conv2d_norms", records.Norms, "(Tensor a, Tensor map, Tensor mean)"
)
conv2d_epilogue = Op[records.Epilogue, Two](
    "conv2d_epilogue", records.Epilogue, "(Tensor y, Tensor norm_map)"
)
conv2d_epilogue_ = Op[records.Epilogue, Tensor](
    "conv2d_epilogue_", records.Epilogue, "Tensor norm_map", writes="u"
)
conv2d_grad_dot = Op[records.GradDot, Three](
    "conv2d_grad_dot", records.GradDot, "(Tensor grad_u, Tensor t, Tensor parts)"
)
conv2d_grad_filters = Op[records.GradFilters, Six](
    "conv2d_grad_filters",
    records.GradFilters,
    "(Tensor grad_weight, Tensor grad_bias, Tensor grad_radius, Tensor grad_mean, Tensor grad_k, "
    "Tensor sigma)",
)
conv2d_grad_input = Op[records.GradInput, Tensor](
    "conv2d_grad_input", records.GradInput, "Tensor grad_x"
)
conv2d_grad_input_ = Op[records.GradInput, None](
    "conv2d_grad_input_", records.GradInput, "()", writes="library_grad", unset="padded"
)
filter_scale = Op[records.FilterScale, Two](
    "filter_scale", records.FilterScale, "(Tensor scaled, Tensor a)"
)
filter_scale_grad = Op[records.FilterScaleGrad, Tensor](
    "filter_scale_grad", records.FilterScaleGrad, "Tensor grad_weight"
)
window_norm = Op[records.WindowNorm, Tensor]("window_norm", records.WindowNorm, "Tensor b")
window_norm_grad = Op[records.WindowNormGrad, Tensor](
    "window_norm_grad", records.WindowNormGrad, "Tensor grad_x"
)
filter_norm = Op[records.FilterNorm, Tensor]("filter_norm", records.FilterNorm, "Tensor a")
conv2d_one_pass = Op[records.OnePass, Three](
    "conv2d_one_pass", records.OnePass, "(Tensor y, Tensor norm_map, Tensor dot)"
)
conv2d_one_pass_grad_input = Op[records.OnePassGradInput, Tensor](
    "conv2d_one_pass_grad_input", records.OnePassGradInput, "Tensor grad_x"
)
depthwise_grad_weight = Op[records.DepthwiseGradWeight, Tensor](
    "depthwise_grad_weight", records.DepthwiseGradWeight, "Tensor grad_weight"
)
