"""The plans of each backend: for each direction what computes it, and what refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from dcconv.call.key import CUDA, FORWARD, INPUT_GRADIENT, TRITON
from dcconv.cudnn import graph
from dcconv.operator.records import Operands, Problem
from dcconv.passes import backward, fused, library
from dcconv.passes.backward import InputGradient, InputSide, WeightGradient
from dcconv.passes.records import COMPILED, OWN_RULE
from dcconv.triton import fused as triton_fused

Forward: TypeAlias = Callable[[Operands, Problem, str], tuple[Tensor, ...]]
Predicate: TypeAlias = Callable[[Operands, Problem], str | None]


class Plans(NamedTuple):
    """What computes one call.

    Attributes:
        forward: as ``library.forward``.
        namespace: of the passes of ``backward.backward``.
        input_gradient, weight_gradient: what it is given for them; None for the library.
    """

    forward: Forward
    namespace: str = COMPILED
    input_gradient: InputGradient | None = None
    weight_gradient: WeightGradient | None = None


class Plan(NamedTuple):
    """One plan: what computes each direction, and predicates that say None or one sentence."""

    title: str
    forward: Forward
    input_gradient: InputGradient
    weight_gradient: WeightGradient
    why_not: Predicate
    why_not_input_gradient: Predicate
    why_not_weight_gradient: Predicate

    def reason(self, direction: str, operands: Operands, problem: Problem) -> str | None:
        """Return None if the plan runs a direction of a call, else one sentence why not."""
        if direction == FORWARD:
            return self.why_not(operands, problem)
        if direction == INPUT_GRADIENT:
            return self.why_not_input_gradient(operands, problem)
        return self.why_not_weight_gradient(operands, problem)


def _never(operands: Operands, problem: Problem) -> str | None:
    return None


def _library_only(operands: Operands, problem: Problem) -> str | None:
    return "the gradient of the weight is the library's"


def _passes(namespace: str) -> Plan:
    """Return plan A on the passes of a namespace."""

    def forward(operands: Operands, problem: Problem, kept: str) -> tuple[Tensor, ...]:
        return library.forward(operands, problem, kept, namespace)

    def input_gradient(side: InputSide, problem: Problem) -> Tensor:
        return backward.input_gradient(side, problem, namespace)

    return Plan(
        "library convolution and fused passes",
        forward,
        input_gradient,
        backward.weight_gradient,
        _never,
        _never,
        _never,
    )


def _triton_one_pass(tile: int) -> Plan:
    """Return Triton's plan B with the tiles of a rule, its own or the autotuner's."""

    def forward(operands: Operands, problem: Problem, kept: str) -> tuple[Tensor, ...]:
        return triton_fused.forward(operands, problem, kept, tile)

    def input_gradient(side: InputSide, problem: Problem) -> Tensor:
        return triton_fused.input_gradient(side, problem, tile)

    return Plan(
        "one pass",
        forward,
        input_gradient,
        triton_fused.weight_gradient,
        triton_fused.why_not,
        triton_fused.why_not_input_gradient,
        triton_fused.why_not_weight_gradient,
    )


_ONE_PASS = Plan(
    "one pass",
    fused.forward,
    fused.input_gradient,
    fused.weight_gradient,
    fused.why_not,
    fused.why_not_input_gradient,
    fused.why_not_weight_gradient,
)
_GRAPH = Plan(
    "cuDNN graph",
    graph.forward,
    graph.input_gradient,
    backward.weight_gradient,
    graph.why_not,
    graph.why_not_input_gradient,
    _library_only,
)

#: Namespace of each backend's passes.
namespaces: dict[str, str] = {CUDA: COMPILED, TRITON: triton_fused.NAMESPACE}

#: The plans of each backend by name, plan A first.
registry: dict[str, dict[str, Plan]] = {
    CUDA: {"A": _passes(namespaces[CUDA]), "B": _ONE_PASS, "G": _GRAPH},
    TRITON: {"A": _passes(namespaces[TRITON]), "B": _triton_one_pass(OWN_RULE)},
}

#: The same where benchmark mode counts: kernels that can be tuned are timed, and run, as tuned.
#: Their predicates are those of ``registry``.
tuned: dict[str, dict[str, Plan]] = {
    **registry,
    TRITON: registry[TRITON] | {"B": _triton_one_pass(triton_fused.AUTOTUNED)},
}
