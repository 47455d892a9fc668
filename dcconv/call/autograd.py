"""The one place where forward and backward ops are composed for autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dcconv import native
from dcconv.call.saved import DOT, NOTHING, OUTPUT
from dcconv.operator import reference
from dcconv.operator.layout import is_channels_last, memory_format
from dcconv.operator.numerics import RADIUS_OFFSET, compute_dtype
from dcconv.operator.records import Operands, Problem, without_autocast
from dcconv.passes import backward
from dcconv.passes.backward import InputGradient, WeightGradient
from dcconv.passes.records import COMPILED

Forward: TypeAlias = Callable[[Operands, Problem, str, Tensor | None], tuple[Tensor, ...]]
# As ``one_op_backward``.
Backward: TypeAlias = Callable[..., Sequence[Tensor | None]]


class Chosen(NamedTuple):
    """What computes one call.

    Attributes:
        forward: as ``library.forward``, or as the compiled op.
        namespace: of the passes of ``backward.backward``.
        input_gradient, weight_gradient: what it is given for them; None for the library.
        backward: all of backward, in the place of that composition; None for the composition.
    """

    forward: Forward
    namespace: str = COMPILED
    input_gradient: InputGradient | None = None
    weight_gradient: WeightGradient | None = None
    backward: Backward | None = None


class PatchNorm(NamedTuple):
    """The two directions of a patch norm: (x, kernel, problem) -> b and its gradient.

    Attributes:
        backward: (grad_b, x, b, kernel, problem) -> grad_x.
    """

    forward: Callable[[Tensor, tuple[int, int], Problem], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, tuple[int, int], Problem], Tensor]


def one_op_forward(
    operands: Operands, problem: Problem, kept: str, sums: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return y, norm map, mean norm and dot product from the compiled op."""
    arguments = native.conv2d_arguments(operands, problem)
    op = torch.ops.dcconv.conv2d_forward.default
    results: tuple[Tensor, ...] = op(*arguments, kept == DOT, kept != NOTHING, sums)
    return results


def one_op_backward(
    grad_y: Tensor,
    kept_tensor: Tensor,
    norm_map: Tensor,
    mean: Tensor,
    operands: Operands,
    problem: Problem,
    kept: str,
    needs: int,
) -> Sequence[Tensor | None]:
    """Return the gradients of the six operands from the compiled op; None for those not needed."""
    # From the radius on: no gradient depends on the bias.
    arguments = native.conv2d_arguments(operands, problem)[3:]
    others = (kept_tensor, norm_map, mean, *arguments, problem.norm_grad, kept, needs)
    op = torch.ops.dcconv.conv2d_backward.default
    grads = op(grad_y, operands.x, operands.weight, *others)
    return [grads[i] if needs >> i & 1 else None for i in range(6)]


class DecoupledConv2dFunction(torch.autograd.Function):
    """y and the batch's mean norm from the compiled ops, with hand-written backward.

    Inputs are the six tensors of ``Operands``, the ``Problem``, what backward keeps, ``Chosen`` or
    None for the compiled ops, and the sums of the squares of x per pixel where they are known: the
    gradient through them is part of x's. Results: those of ``Chosen.forward``; all but y are not
    differentiable and only there so that backward can save them.

    forward takes the context itself: a separate setup_context makes every call inspect the
    signature, 95 us each (measured), and only torch.func needs it, which runs on the reference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        radius: Tensor | None,
        norm_mean: Tensor | None,
        k: Tensor | None,
        problem: Problem,
        kept: str,
        chosen: Chosen | None,
        sums: Tensor | None,
    ) -> tuple[Tensor, ...]:
        raw: Tensor | None = None
        if problem.learned:
            assert radius is not None
            dtype = compute_dtype(x.dtype)
            # As it is now: another may be loaded before backward.
            raw = radius.to(dtype, copy=True) if radius.dtype != dtype else radius.clone()
            ctx.learned, radius = radius, raw.square().add_(RADIUS_OFFSET)
        operands = Operands(x, weight, bias, radius, norm_mean, k)
        if chosen is not None:
            results = chosen.forward(operands, problem, kept, sums)
        else:  # one_op_forward, a call nearer
            arguments = native.conv2d_arguments(operands, problem)
            op = torch.ops.dcconv.conv2d_forward.default
            results = op(*arguments, kept == DOT, kept != NOTHING, sums)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        y, norm_map, mean, dot, *more = results
        kept_tensor = y if kept == OUTPUT else dot
        # Without bias: no gradient depends on it, and nn.Conv2d lets it change before backward.
        parameters = (raw, radius, norm_mean, k)
        ctx.save_for_backward(x, weight, *parameters, kept_tensor, norm_map, mean, *more)
        ctx.call = problem, kept, chosen
        return results

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 10
        x, weight, raw, radius, norm_mean, k, *saved = ctx.saved_tensors
        kept_tensor, norm_map, mean, *more = saved
        problem, kept, chosen = ctx.call
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            bias = weight.new_zeros(weight.shape[0]).requires_grad_() if wanted[2] else None
            if raw is not None:
                # With the value kept and the slope of the parameter.
                raw = ctx.learned + (raw - ctx.learned).detach()
                radius = raw.square() + RADIUS_OFFSET
            operands = Operands(x, weight, bias, radius, norm_mean, k)
            exact = reference_gradients(operands, problem, grad_y, wanted[:6])
            return (*_of_raw(exact, raw, ctx), None, None, None, None)
        operands = Operands(x, weight, None, radius, norm_mean, k)
        try:
            needs = 0
            for i in range(6):
                needs |= wanted[i] << i
            whole = one_op_backward if chosen is None else chosen.backward
            if whole is not None:
                found = whole(grad_y, kept_tensor, norm_map, mean, operands, problem, kept, needs)
            else:
                (a,) = more
                found = backward.backward(
                    grad_y,
                    kept_tensor,
                    norm_map,
                    mean,
                    a,
                    operands,
                    problem,
                    kept,
                    needs,
                    chosen.namespace,
                    chosen.input_gradient,
                    chosen.weight_gradient,
                )
            own = _in_layout(found, x, weight)
            return (*_of_raw(own, raw, ctx), None, None, None, None)
        except RuntimeError as error:
            known = native.as_pytorch(error)
            raise known from None


def _of_raw(
    grads: Sequence[Tensor | None], raw: Tensor | None, ctx: Any
) -> Sequence[Tensor | None]:
    """Return gradients of which the radius's is that of what is learned, r = raw^2 + 1e-4."""
    grad = grads[3]
    if raw is None or grad is None:
        return grads
    product = grad * raw
    grad = product + product  # exact, and without a tensor made of a number
    if grad.dtype != ctx.learned.dtype:
        grad = grad.to(ctx.learned.dtype)
    return *grads[:3], grad, *grads[4:]


def _in_layout(
    grads: Sequence[Tensor | None], x: Tensor, weight: Tensor
) -> Sequence[Tensor | None]:
    """Return gradients of which the weight's has the layout that either operand decides.

    The ops give it in the weight's own; ``F.conv2d`` gives it in the result's.
    """
    grad_x, grad_weight, *others = grads
    if grad_weight is not None:
        wanted = memory_format(x, weight)
        if (wanted is torch.channels_last) != is_channels_last(weight):
            grad_weight = grad_weight.contiguous(memory_format=wanted)
    return grad_x, grad_weight, *others


def reference_gradients(
    operands: Operands, problem: Problem, grad_y: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return differentiable gradients of the reference: the first half of a double backward."""
    with without_autocast(operands.x):
        # Aliases: partial derivatives are wanted, also where one operand is computed from another.
        operands = Operands._make(
            t.view_as(t) if t is not None and t.requires_grad else t for t in operands
        )
        inputs = [t for t, want in zip(operands, wanted, strict=True) if want and t is not None]
        y, _ = reference.forward(operands, problem)
        found = iter(
            torch.autograd.grad(
                y, inputs, grad_y, create_graph=True, allow_unused=True, materialize_grads=True
            )
        )
    return [next(found) if want else None for want in wanted]


class PatchNormFunction(torch.autograd.Function):
    """The patch-norm map from a backend's own operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: tuple[int, int], problem: Problem, directions: PatchNorm
    ) -> Tensor:
        b = directions.forward(x, kernel, problem)
        ctx.save_for_backward(x, b)
        ctx.call = kernel, problem, directions
        return b

    @staticmethod
    def backward(ctx: Any, grad_b: Tensor) -> tuple[Any, ...]:
        x, b = ctx.saved_tensors
        kernel, problem, directions = ctx.call
        if torch.is_grad_enabled():
            with without_autocast(x):
                again = reference.window_norm(x, kernel, problem)
                (grad_x,) = torch.autograd.grad(again, (x,), grad_b, create_graph=True)
            return grad_x, None, None, None
        return directions.backward(grad_b, x, b, kernel, problem), None, None, None
