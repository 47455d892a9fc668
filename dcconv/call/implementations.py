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

from dcconv.call import cpu, refusals, rule
from dcconv.call.autograd import PatchNorm
from dcconv.call.key import DIRECTIONS, FORWARD, Key
from dcconv.call.refusals import Call
from dcconv.call.rule import FUSED, GRAPH, LIBRARY
from dcconv.cudnn import graph
from dcconv.operator import reference
from dcconv.operator.records import Operands, Problem
from dcconv.passes import backward, fused, library, ops, records
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
        order: of its strategies, for a key; None where no choice is made in Python.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[[Call], str | None]
    patch_norm: PatchNorm | None
    namespace: str | None = None
    order: Callable[[Key], rule.Order] | None = None


class Implementation(NamedTuple):
    """One row.

    Attributes:
        backend, direction, strategy: what it is.
        why_not: None if it computes the direction of a call that the backend runs, else one
            sentence.
        run: forward is ``forward(operands, problem, kept, sums)``; gradients are those of
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


def _composed(
    name: str,
    namespace: str,
    why_not: Callable[[Call], str | None],
    order: Callable[[Key], rule.Order],
) -> Backend:
    """Return a backend for GPUs, composed of the passes of a namespace."""
    patch_norm = PatchNorm(
        partial(library.window_norm, namespace=namespace),
        partial(backward.window_norm_grad, namespace=namespace),
    )
    return Backend(name, ("cuda",), why_not, patch_norm, namespace, order)


def _patch_norm(x: Tensor, kernel: tuple[int, int], problem: Problem) -> Tensor:
    call = records.WindowNorm(x, kernel, problem.window, problem.operator.eps)
    return ops.patch_norm_forward(call)


def _patch_norm_grad(
    grad_b: Tensor, x: Tensor, b: Tensor, kernel: tuple[int, int], problem: Problem
) -> Tensor:
    return ops.patch_norm_backward(records.WindowNormGrad(grad_b, x, b, kernel, problem.window))


CUDA = _composed("cuda", CUDA_OPS, refusals.cuda, rule.order_on_cuda)
TRITON = _composed("triton", TRITON_OPS, refusals.triton, rule.order_in_triton)
CPU = Backend("cpu", ("cpu",), refusals.cpu, PatchNorm(_patch_norm, _patch_norm_grad))
REFERENCE = Backend("reference", (), refusals.reference, None)


def _willing(operands: Operands, problem: Problem, direction: str = FORWARD) -> str | None:
    return None


def _reference(operands: Operands, problem: Problem, kept: str) -> tuple[Tensor, Tensor | None]:
    return reference.forward(operands, problem)


def _rows(
    backend: Backend,
    strategy: str,
    why_not: Callable[..., str | None],
    runs: tuple[Run, Run, Run],
    tuned: tuple[Run | None, Run | None, Run | None] = (None, None, None),
) -> list[Implementation]:
    """Return the rows of a strategy, one per direction."""
    return [
        Implementation(backend, name, strategy, partial(why_not, direction=name), run, own)
        for name, run, own in zip(DIRECTIONS, runs, tuned, strict=True)
    ]


def _librarys(namespace: str) -> tuple[Run, Run, Run]:
    forward = partial(library.forward, namespace=namespace)
    return forward, partial(backward.input_gradient, namespace=namespace), backward.weight_gradient


def _on_cpu(strategy: str) -> tuple[Run, Run, Run]:
    gradients = cpu.backward(strategy)
    return cpu.forward(strategy), gradients, gradients


def _in_triton(tile: int) -> tuple[Run, Run]:
    forward = partial(triton_fused.forward, tile=tile)
    return forward, partial(triton_fused.input_gradient, tile=tile)


ONE_PASS = (fused.forward, fused.input_gradient, fused.weight_gradient)
GRAPHS = (graph.forward, graph.input_gradient, backward.weight_gradient)
OWN = (*_in_triton(OWN_RULE), triton_fused.weight_gradient)
TUNED = (*_in_triton(triton_fused.AUTOTUNED), None)

#: Every implementation, backends in order of preference. The reference has its forward alone:
#: autograd differentiates it.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    *_rows(CUDA, LIBRARY, _willing, _librarys(CUDA_OPS)),
    *_rows(CUDA, FUSED, fused.why_not, ONE_PASS),
    *_rows(CUDA, GRAPH, graph.why_not, GRAPHS),
    *_rows(TRITON, LIBRARY, _willing, _librarys(TRITON_OPS)),
    *_rows(TRITON, FUSED, triton_fused.why_not, OWN, TUNED),
    *_rows(CPU, LIBRARY, _willing, _on_cpu(LIBRARY)),
    *_rows(CPU, FUSED, cpu.why_not_fused, _on_cpu(FUSED)),
    Implementation(REFERENCE, FORWARD, LIBRARY, _willing, _reference),
)

#: The backends of the list, in its order, by name.
backends: dict[str, Backend] = {row.backend.name: row.backend for row in IMPLEMENTATIONS}

#: The rows of a backend's direction by strategy, in the list's order.
rows: dict[tuple[str, str], dict[str, Implementation]] = {}
for _row in IMPLEMENTATIONS:
    rows.setdefault((_row.backend.name, _row.direction), {})[_row.strategy] = _row
