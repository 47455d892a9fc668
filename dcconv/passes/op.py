"""What is made of an op's record and its fake: schema, arguments, registration.

A schema is written from the record, a record is laid out as arguments, and arguments are gathered
to a record again: here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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
# Of a record with shapes in the place of tensors, and the shapes of the results.
Flops = Callable[[Any, Any], int]


def _fields(record: Any) -> dict[str, Any]:
    """Return the types of a record's fields by their names, nothing for what is no record."""
    if not hasattr(record, "_fields"):
        return {}
    hints = get_type_hints(record, include_extras=True)
    return {name: hints[name] for name in record._fields}


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


def no_flops(call: Any, results: Any) -> int:
    """Passes are not matrix work; PyTorch's counter leaves elementwise work out as well."""
    return 0


class Op(Generic[Record, Result]):
    """An op, in the namespaces of whoever implements it.

    Args:
        fake: what is the same for every library that has the op: it takes the record of a call,
            requires that its sizes fit together, and returns tensors of the shapes, dtypes and
            layouts of the results.
        results: names of the results, empty for what the schema leaves nameless.
        name: of the op, without its namespace; None for the fake's.
        writes: the argument that the result is written over, if it is.
        fixed: fields that are no arguments, and their values.
        static: whether its integers are numbers alone, no symbols of a compiler.
        flops: multiplications and additions of a call.
    """

    def __init__(
        self,
        fake: Callable[[Record], Result],
        results: Sequence[str],
        name: str | None = None,
        writes: str = "",
        fixed: Mapping[str, Any] | None = None,
        static: bool = False,
        flops: Flops = no_flops,
    ) -> None:
        self.fake, self.name, self.writes, self._flops = fake, name or fake.__name__, writes, flops
        self._results, self._static = [f"Tensor {result}".strip() for result in results], static
        self._record: Any = get_type_hints(fake)["call"]
        # Stretches of arguments, and the record that each is: None for fields of the op's own.
        self._stretches: list[tuple[int, int, Any]] = []
        self._arguments: dict[str, Any] = {}
        for name, kind in _fields(self._record).items():
            start, inner = len(self._arguments), _fields(kind)
            self._arguments |= inner or {name: kind}
            self._stretches.append((start, len(self._arguments), kind if inner else None))
        nested = [i for i, (_, _, record) in enumerate(self._stretches) if record is not None]
        self._flat = _flattener(nested)
        # By place among the arguments, ascending.
        names = list(self._arguments)
        self._fixed = {names.index(name): value for name, value in (fixed or {}).items()}
        self._overloads: dict[str, Any] = {}

    @property
    def schema(self) -> str:
        """The arguments and results of the op, after its name."""
        defaults = getattr(self._record, "_field_defaults", {})
        arguments = []
        for name, kind in self._arguments.items():
            written = "(a!)" if name == self.writes else ""
            usual = f"={defaults[name]}" if name in defaults else ""
            own = getattr(kind, "__metadata__", None)
            type_name = own[0] if own else _TYPES[kind]
            if self._static:
                type_name = type_name.replace("SymInt", "int")
            arguments.append(f"{type_name}{written} {name}{usual}")
        arguments = [text for i, text in enumerate(arguments) if i not in self._fixed]
        results = ", ".join(self._results)
        return f"({', '.join(arguments)}) -> " + (
            results if len(self._results) == 1 else f"({results})"
        )

    def flat(self, call: Record) -> tuple[Any, ...]:
        """Return the arguments of a call, in schema order."""
        arguments = self._flat(call)
        if not self._fixed:
            return arguments
        return tuple([value for i, value in enumerate(arguments) if i not in self._fixed])

    def record_of(self, *arguments: Any) -> Record:
        """Return the record of a call's arguments; those at the end may be left to defaults."""
        for place, value in self._fixed.items():
            arguments = (*arguments[:place], value, *arguments[place:])
        fields: list[Any] = []
        for start, end, record in self._stretches:
            own = arguments[start:end]
            fields += own if record is None else (record(*own),)
        result: Record = self._record(*fields)
        return result

    def taking(self, function: Callable[[Record], Any]) -> Callable[..., Any]:
        """Return the function of arguments that calls a function of their record."""

        def run(*arguments: Any) -> Any:
            return function(self.record_of(*arguments))

        return run

    def register(self, namespace: str) -> None:
        """Find the op of a namespace, which has it defined; register fake and FLOP formula."""

        def count(*arguments: Any, out_shape: Any = None, **others: Any) -> int:
            return self._flops(self.record_of(*arguments), out_shape)

        packet = getattr(getattr(torch.ops, namespace), self.name)
        self._overloads[namespace] = packet.default
        torch.library.register_fake(f"{namespace}::{self.name}", self.taking(self.fake))
        register_flop_formula(packet)(count)

    def __call__(self, call: Record, namespace: str = COMPILED) -> Result:
        """Run the op of a namespace."""
        result: Result = self._overloads[namespace](*self.flat(call))
        return result


def op(*results: str, **options: Any) -> Callable[[Callable[[Record], Result]], Op[Record, Result]]:
    """Make an op of its fake; arguments as of :class:`Op`."""
    return lambda fake: Op(fake, results, **options)
