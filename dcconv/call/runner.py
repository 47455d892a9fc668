"""Backends as a call takes them: a convolution and a patch norm that autograd knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dcconv import native
from dcconv.call import autograd, implementations, strategy
from dcconv.call.implementations import Backend
from dcconv.call.key import FORWARD
from dcconv.call.refusals import Call
from dcconv.call.rule import LIBRARY
from dcconv.call.saved import NOTHING
from dcconv.operator import reference
from dcconv.operator.records import Operands, Problem
from dcconv.passes import records

# y, and the batch's mean norm or an empty tensor; the text says what backward keeps, the last
# tensor are the sums of the squares of x per pixel and group, where they are known.
Conv2d: TypeAlias = Callable[[Operands, Problem, str, Tensor | None], tuple[Tensor, Tensor | None]]


class Runner(NamedTuple):
    """One backend: its record, its convolution and its patch norm."""

    backend: Backend
    conv2d: Conv2d
    patch_norm: Callable[[Tensor, tuple[int, int], Problem], Tensor]

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name

    def why_not(self, call: Call) -> str | None:
        """Return None if the backend runs a call, else one sentence."""
        return self.backend.why_not(call)


def _differentiated(operands: Operands) -> bool:
    if not torch.is_grad_enabled():
        return False
    # One after another: a generator takes as long as the rest of such a call.
    x, weight, bias, radius, norm_mean, k = operands
    return (
        weight.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (radius is not None and radius.requires_grad)
        or (norm_mean is not None and norm_mean.requires_grad)
        or (k is not None and k.requires_grad)
    )


def _needs(operands: Operands) -> int:
    needs = records.NEEDS_X if operands.x.requires_grad else 0
    return needs | records.NEEDS_WEIGHT if operands.weight.requires_grad else needs


def _one_op(
    operands: Operands, problem: Problem, mode: str, sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    differentiated = _differentiated(operands)
    chosen: autograd.Chosen | None = None
    if not torch.compiler.is_compiling() and strategy.is_bound():
        chosen = strategy.force(operands, problem, _needs(operands) if differentiated else None)
    try:
        if differentiated:
            how = (problem, mode, chosen, sums)
            results = autograd.DecoupledConv2dFunction.apply(*operands, *how)
        else:
            forward = autograd.one_op_forward if chosen is None else chosen.forward
            results = forward(operands, problem, NOTHING, sums)
    except RuntimeError as error:
        known = native.as_pytorch(error)
        raise known from None
    return results[0], results[2]


def _composed_by(backend: str, benchmarks: Callable[[], bool]) -> Conv2d:
    def conv2d(
        operands: Operands, problem: Problem, mode: str, sums: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        differentiated = _differentiated(operands)
        kept, needs = (mode, _needs(operands)) if differentiated else (NOTHING, 0)
        chosen = strategy.choose(backend, operands, problem, kept, needs, benchmarks())
        try:
            if differentiated:
                how = (problem, mode, chosen, sums)
                results = autograd.DecoupledConv2dFunction.apply(*operands, *how)
            else:
                results = chosen.forward(operands, problem, NOTHING, sums)
        except RuntimeError as error:
            known = native.as_pytorch(error)
            raise known from None
        return results[0], results[2]

    return conv2d


def _plain_by(backend: str) -> Conv2d:
    def conv2d(
        operands: Operands, problem: Problem, mode: str, sums: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # What autograd differentiates has to see the squares.
        y, mean = implementations.rows[backend, FORWARD][LIBRARY].run(operands, problem, mode)
        return y, mean

    return conv2d


def _patch_norm_by(directions: autograd.PatchNorm) -> Callable[..., Tensor]:
    def patch_norm(x: Tensor, kernel: tuple[int, int], problem: Problem) -> Tensor:
        b: Tensor = autograd.PatchNormFunction.apply(x, kernel, problem, directions)
        return b

    return patch_norm


def runner(backend: Backend, benchmarks: Callable[[], bool]) -> Runner:
    """Return a backend as calls take it.

    Args:
        backend: one of the list's.
        benchmarks: says whether a call measures what is not known.
    """
    directions = backend.patch_norm
    if directions is None:
        return Runner(backend, _plain_by(backend.name), reference.window_norm)
    conv2d = _one_op if backend.namespace is None else _composed_by(backend.name, benchmarks)
    return Runner(backend, conv2d, _patch_norm_by(directions))
