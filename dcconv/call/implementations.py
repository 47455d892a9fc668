"""The one list of implementations: what computes a direction of a call, by which strategy, where.

``IMPLEMENTATIONS`` is in order of preference of backends. A backend is asked first, by its own
predicate, whether it runs a call at all; then each of its rows says whether its strategy computes
the direction. Whatever else the package knows about backends (their names and order, the devices
they are meant for, the ops they are made of) is read from here: adding a backend is adding its
rows, and the folder with what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from dcconv import native
from dcconv.call import cpu, refusals
from dcconv.call.autograd import PatchNorm
from dcconv.call.key import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Key
from dcconv.call.refusals import Call
from dcconv.call.rule import (
    FUSED,
    GRAPH,
    LIBRARY,
    prefers_fused_in_triton,
    prefers_fused_on_cuda,
)
from dcconv.cudnn import graph
from dcconv.operator import reference
from dcconv.operator.records import Operands, Problem
from dcconv.passes import backward, fused, library
from dcconv.passes.records import COMPILED, OWN_RULE
from dcconv.triton import fused as triton_fused

Predicate: TypeAlias = Callable[[Operands, Problem], str | None]
Run: TypeAlias = Callable[..., Any]


class Backend(NamedTuple):
    """What the rows of one backend have in common.

    Attributes:
        name: as users type it.
        devices: types of the devices that it is meant for. Where none of these backends is willing,
            the last one runs, with a warning. Others that are willing, such as interpreted kernels,
            run where they are named.
        why_not: None if it runs a call, else one sentence.
        patch_norm: both directions of a patch norm; None for operations that autograd knows.
        namespace: of the passes that its strategies are made of; None where one op, or PyTorch's
            own operations, do the whole direction.
        prefers_fused: whether one pass should be the fastest for a key; None where no choice is
            made in Python.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[[Call], str | None]
    patch_norm: PatchNorm | None
    namespace: str | None = None
    prefers_fused: Callable[[Key], bool] | None = None


class Implementation(NamedTuple):
    """One row.

    Attributes:
        backend, direction, strategy: what it is.
        why_not: None if it computes the direction of a call that the backend runs, else one
            sentence.
        run: forward is ``forward(operands, problem, kept)``; gradients are those of
            ``backward.backward`` where passes are composed, and the whole backward op on cpu.
        tuned: the same where benchmark mode counts, with kernels as they were tuned; None if that
            changes nothing.
    """

    backend: Backend
    direction: str
    strategy: str
    why_not: Predicate
    run: Run
    tuned: Run | None = None

    def run_as(self, benchmark: bool) -> Run:
        """Return what runs, in benchmark mode or not."""
        return self.tuned if benchmark and self.tuned is not None else self.run


CUDA_OPS, TRITON_OPS = COMPILED, triton_fused.NAMESPACE


def _patch_norm(namespace: str) -> PatchNorm:
    return PatchNorm(
        partial(library.window_norm, namespace=namespace),
        partial(backward.window_norm_grad, namespace=namespace),
    )


CUDA = Backend(
    "cuda",
    ("cuda",),
    refusals.cuda,
    _patch_norm(CUDA_OPS),
    CUDA_OPS,
    prefers_fused_on_cuda,
)
TRITON = Backend(
    "triton",
    ("cuda",),
    refusals.triton,
    _patch_norm(TRITON_OPS),
    TRITON_OPS,
    prefers_fused_in_triton,
)
CPU = Backend("cpu", ("cpu",), refusals.cpu, PatchNorm(native.patch_norm, native.patch_norm_grad))
REFERENCE = Backend("reference", (), refusals.reference, None)


def _willing(operands: Operands, problem: Problem) -> str | None:
    return None


def _librarys(operands: Operands, problem: Problem) -> str | None:
    return "the gradient of the weight is the library's"


def _reference(operands: Operands, problem: Problem, kept: str) -> tuple[Tensor, Tensor | None]:
    return reference.forward(operands, problem)


OWN, TUNED = OWN_RULE, triton_fused.AUTOTUNED

#: Every implementation, backends in order of preference. The reference has its forward alone:
#: autograd differentiates it.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(CUDA, FORWARD, LIBRARY, _willing, partial(library.forward, namespace=CUDA_OPS)),
    Implementation(CUDA, FORWARD, FUSED, fused.why_not, fused.forward),
    Implementation(CUDA, FORWARD, GRAPH, graph.why_not, graph.forward),
    Implementation(
        CUDA,
        INPUT_GRADIENT,
        LIBRARY,
        _willing,
        partial(backward.input_gradient, namespace=CUDA_OPS),
    ),
    Implementation(CUDA, INPUT_GRADIENT, FUSED, fused.why_not_input_gradient, fused.input_gradient),
    Implementation(CUDA, INPUT_GRADIENT, GRAPH, graph.why_not_input_gradient, graph.input_gradient),
    Implementation(CUDA, WEIGHT_GRADIENT, LIBRARY, _willing, backward.weight_gradient),
    Implementation(
        CUDA, WEIGHT_GRADIENT, FUSED, fused.why_not_weight_gradient, fused.weight_gradient
    ),
    Implementation(CUDA, WEIGHT_GRADIENT, GRAPH, _librarys, backward.weight_gradient),
    Implementation(
        TRITON, FORWARD, LIBRARY, _willing, partial(library.forward, namespace=TRITON_OPS)
    ),
    Implementation(
        TRITON,
        FORWARD,
        FUSED,
        triton_fused.why_not,
        partial(triton_fused.forward, tile=OWN),
        partial(triton_fused.forward, tile=TUNED),
    ),
    Implementation(
        TRITON,
        INPUT_GRADIENT,
        LIBRARY,
        _willing,
        partial(backward.input_gradient, namespace=TRITON_OPS),
    ),
    Implementation(
        TRITON,
        INPUT_GRADIENT,
        FUSED,
        triton_fused.why_not_input_gradient,
        partial(triton_fused.input_gradient, tile=OWN),
        partial(triton_fused.input_gradient, tile=TUNED),
    ),
    Implementation(TRITON, WEIGHT_GRADIENT, LIBRARY, _willing, backward.weight_gradient),
    Implementation(
        TRITON,
        WEIGHT_GRADIENT,
        FUSED,
        triton_fused.why_not_weight_gradient,
        triton_fused.weight_gradient,
    ),
    *(
        Implementation(CPU, direction, strategy, why_not, run)
        for direction, op in (
            (FORWARD, cpu.forward),
            (INPUT_GRADIENT, cpu.backward),
            (WEIGHT_GRADIENT, cpu.backward),
        )
        for strategy, why_not, run in (
            (LIBRARY, _willing, op(LIBRARY)),
            (FUSED, cpu.why_not_fused(direction), op(FUSED)),
        )
    ),
    Implementation(REFERENCE, FORWARD, LIBRARY, _willing, _reference),
)

#: The backends of the list, in its order, by name.
backends: dict[str, Backend] = {row.backend.name: row.backend for row in IMPLEMENTATIONS}

#: The rows of a backend's direction by strategy, in the list's order.
rows: dict[tuple[str, str], dict[str, Implementation]] = {}
for _row in IMPLEMENTATIONS:
    rows.setdefault((_row.backend.name, _row.direction), {})[_row.strategy] = _row
