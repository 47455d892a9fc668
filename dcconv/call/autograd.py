"""The one place where forward and backward ops are composed for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcconv import native
from dcconv.call.implementations import Plans
from dcconv.call.saved import DOT, NOTHING, OUTPUT
from dcconv.operator import reference
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import RADIUS_OFFSET, compute_dtype
from dcconv.operator.records import Operands, Problem, without_autocast
from dcconv.passes import backward, library, records
from dcconv.triton import fused as triton_fused

# How a patch norm runs: one compiled op per direction, or plan A's composition, of compiled passes
# or of Triton's.
ONE_OP, PLAN_A, TRITON = "one_op", "plan_a", "triton"

# Namespace of the passes that a plan composes.
PASSES = {PLAN_A: records.COMPILED, TRITON: triton_fused.NAMESPACE}


def conv2d_forward(
    operands: Operands, problem: Problem, kept: str, plans: Plans | None
) -> tuple[Tensor, ...]:
    """Run forward: y, norm map, mean norm, dot product, and what else the plans' backward saves.

    Args:
        plans: what computes each direction; None for one compiled op per direction.

    Raises:
        RuntimeError, torch.OutOfMemoryError: as PyTorch's own operations of the device do.
    """
    try:
        if plans is not None:
            return plans.forward(operands, problem, kept)
        arguments = native.conv2d_arguments(operands, problem)
        op = torch.ops.dcconv.conv2d_forward.default
        results: tuple[Tensor, ...] = op(*arguments, kept == DOT, kept != NOTHING)
        return results
    except RuntimeError as error:
        known = native.as_pytorch(error)
        raise known from None


class DecoupledConv2dFunction(torch.autograd.Function):
    """y and the batch's mean norm from the compiled ops, with hand-written backward.

    Inputs are the six tensors of ``Operands``, the ``Problem``, what backward keeps, and the plans.
    Results: those of ``conv2d_forward``; all but y are not differentiable and only there so that
    backward can save them.

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
        plans: Plans | None,
    ) -> tuple[Tensor, ...]:
        raw: Tensor | None = None
        if problem.learned:
            assert radius is not None
            dtype = compute_dtype(x.dtype)
            # As it is now: another may be loaded before backward.
            raw = radius.to(dtype, copy=True) if radius.dtype != dtype else radius.clone()
            ctx.learned, radius = radius, raw.square().add_(RADIUS_OFFSET)
        operands = Operands(x, weight, bias, radius, norm_mean, k)
        results = conv2d_forward(operands, problem, kept, plans)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        y, norm_map, mean, dot, *more = results
        kept_tensor = y if kept == OUTPUT else dot
        # Without bias: no gradient depends on it, and nn.Conv2d lets it change before backward.
        parameters = (raw, radius, norm_mean, k)
        ctx.save_for_backward(x, weight, *parameters, kept_tensor, norm_map, mean, *more)
        ctx.call = problem, kept, plans
        return results

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 9
        x, weight, raw, radius, norm_mean, k, *saved = ctx.saved_tensors
        kept_tensor, norm_map, mean, *more = saved
        problem, kept, plans = ctx.call
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            bias = weight.new_zeros(weight.shape[0]).requires_grad_() if wanted[2] else None
            if raw is not None:
                # With the value kept and the slope of the parameter.
                raw = ctx.learned + (raw - ctx.learned).detach()
                radius = raw.square() + RADIUS_OFFSET
            operands = Operands(x, weight, bias, radius, norm_mean, k)
            exact = reference_gradients(operands, problem, grad_y, wanted[:6])
            return (*_of_raw(exact, raw, ctx), None, None, None)
        operands = Operands(x, weight, None, radius, norm_mean, k)
        try:
            needs = 0
            for i in range(6):
                needs |= wanted[i] << i
            if plans is not None:
                (a,) = more
                planned = backward.backward(
                    grad_y,
                    kept_tensor,
                    norm_map,
                    mean,
                    a,
                    operands,
                    problem,
                    kept,
                    needs,
                    plans.namespace,
                    plans.input_gradient,
                    plans.weight_gradient,
                )
                own = _in_layout(planned, x, weight)
                return (*_of_raw(own, raw, ctx), None, None, None)
            arguments = native.conv2d_arguments(operands, problem)
            others = (kept_tensor, norm_map, mean, *arguments[3:], problem.norm_grad, kept, needs)
            op = torch.ops.dcconv.conv2d_backward.default
            grads = op(grad_y, x, weight, *others)
            found = [grads[i] if wanted[i] else None for i in range(6)]
            own = _in_layout(found, x, weight)
            return (*_of_raw(own, raw, ctx), None, None, None)
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
    return *grads[:3], (grad * raw * 2.0).to(ctx.learned.dtype), *grads[4:]


def _in_layout(
    grads: Sequence[Tensor | None], x: Tensor, weight: Tensor
) -> Sequence[Tensor | None]:
    """Return gradients of which the weight's has the layout that either operand decides.

    The ops give it in the weight's own; ``F.conv2d`` gives it in the result's.
    """
    grad_x, grad_weight, *others = grads
    if grad_weight is not None:
        grad_weight = grad_weight.contiguous(memory_format=memory_format(x, weight))
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
    """The patch-norm map from the compiled ops."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: tuple[int, int], problem: Problem, plan: str
    ) -> Tensor:
        if plan in PASSES:
            b = library.window_norm(x, kernel, problem, PASSES[plan])
        else:
            b = torch.ops.dcconv.patch_norm_forward(
                x,
                list(kernel),
                list(problem.window.stride),
                list(problem.window.padding),
                list(problem.window.dilation),
                problem.window.groups,
                problem.window.padding_mode,
                problem.operator.eps,
            )
        ctx.save_for_backward(x, b)
        ctx.kernel = kernel
        ctx.problem = problem
        ctx.plan = plan
        return b

    @staticmethod
    def backward(ctx: Any, grad_b: Tensor) -> tuple[Any, ...]:
        x, b = ctx.saved_tensors
        problem: Problem = ctx.problem
        if torch.is_grad_enabled():
            with without_autocast(x):
                again = reference.window_norm(x, ctx.kernel, problem)
                (grad_x,) = torch.autograd.grad(again, (x,), grad_b, create_graph=True)
            return grad_x, None, None, None
        if ctx.plan in PASSES:
            grad_x = backward.window_norm_grad(grad_b, x, b, ctx.kernel, problem, PASSES[ctx.plan])
            return grad_x, None, None, None
        grad_x = torch.ops.dcconv.patch_norm_backward(
            grad_b,
            x,
            b,
            list(ctx.kernel),
            list(problem.window.stride),
            list(problem.window.padding),
            list(problem.window.dilation),
            problem.window.groups,
            problem.window.padding_mode,
        )
        return grad_x, None, None, None
