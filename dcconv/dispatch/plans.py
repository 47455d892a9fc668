"""The plans of the cuda backend: for each direction what computes it, and what refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from dcconv import plan_a, plan_b, plan_g
from dcconv.dispatch.key import FORWARD, INPUT_GRADIENT
from dcconv.plan_a import InputGradient, WeightGradient
from dcconv.problem import Operands, Problem

Forward: TypeAlias = Callable[[Operands, Problem, str], tuple[Tensor, ...]]
Predicate: TypeAlias = Callable[[Operands, Problem], str | None]


class Plans(NamedTuple):
    """What computes one call.

    Attributes:
        forward: as ``plan_a.forward``.
        namespace: of the passes of ``plan_a.backward``.
        input_gradient, weight_gradient: what it is given for them; None for the library.
    """

    forward: Forward
    namespace: str = plan_a.COMPILED
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


A = Plan(
    "library convolution and fused passes",
    plan_a.forward,
    plan_a.input_gradient,
    plan_a.weight_gradient,
    _never,
    _never,
    _never,
)
B = Plan(
    "one pass",
    plan_b.forward,
    plan_b.input_gradient,
    plan_b.weight_gradient,
    plan_b.why_not,
    plan_b.why_not_input_gradient,
    plan_b.why_not_weight_gradient,
)


G = Plan(
    "cuDNN graph",
    plan_g.forward,
    plan_g.input_gradient,
    plan_a.weight_gradient,
    plan_g.why_not,
    plan_g.why_not_input_gradient,
    _library_only,
)

#: The plans by name, plan A first.
plans: dict[str, Plan] = {"A": A, "B": B, "G": G}
