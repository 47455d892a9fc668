"""Calls of the one-pass ops of the emulated library, and what they should give in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import builds
import pytest
import torch
from accuracy import check, reference_call
from calls import convolution
from cases import Case, Inputs
from emulated import ops_library
from torch import Tensor
from torch.nn import functional as F

from dcconv.operator import reference
from dcconv.operator.numerics import angle_delta, compute_dtype
from dcconv.operator.records import Problem


@contextmanager
def emulated_ops() -> Iterator[Any]:
    """``torch.ops.dcconv_simt`` on one thread; what a kernel does not write is NaN.

    Skips where the library cannot be built.
    """
    reason = builds.why_not(builds.FAST)
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(ops_library()))
    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    # Deterministic algorithms also fill new tensors.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.ops.dcconv_simt
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


def problem_of(inputs: Inputs) -> Problem:
    tensors = inputs.tensors
    usual = {"radius": tensors.get("radius"), "k": tensors.get("k")}
    options = {name: value for name, value in usual.items() if value is not None}
    everything = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "angular": "cosine",
        "weighting": "none",
        "alpha": 1.0,
        "beta": 0.5,
        "radius": 1.0,
        "norm_mean": None,
        "k": 0.3,
        "power": 2.0,
        "eps": 1e-4,
        "padding_mode": "zeros",
    }
    _, problem = convolution(
        tensors["x"],
        tensors["weight"],
        tensors.get("bias"),
        **(everything | inputs.options | options),
    )
    return problem._replace(delta=angle_delta(tensors["x"]))


def geometry_of(problem: Problem) -> tuple[Any, ...]:
    return (
        problem.window.stride,
        problem.window.padding,
        problem.window.dilation,
        problem.window.groups,
        problem.window.padding_mode,
    )


def to_map(b: Tensor, last: bool) -> Tensor:
    """[n, groups, p, q] in the order of the kernels' maps."""
    return (b.permute(0, 2, 3, 1) if last else b).reshape(-1).contiguous()


def from_map(flat: Tensor, like: Tensor, last: bool) -> Tensor:
    n, groups, p, q = like.shape
    if last:
        return flat.view(n, p, q, groups).permute(0, 3, 1, 2)
    return flat.view(n, groups, p, q)


def layout_of(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def check_forward(
    ops: Any, kernel: str, name: str, inputs: Inputs, last: bool, keep_dot: bool, tile: int = -1
) -> None:
    """Judge y, b and u of one call by the accuracy rule."""
    problem = problem_of(inputs)
    tensors, options = inputs
    x, weight = (tensors[t].contiguous(memory_format=layout_of(last)) for t in ("x", "weight"))
    compute, dtype = compute_dtype(x.dtype), x.dtype
    size = (weight.shape[2], weight.shape[3])
    b = reference.window_norm(x.double(), size, problem)
    batch = options.get("norm_mean") == "batch"
    mean, given = None, None
    if batch:
        given = to_map(b, last).to(compute)
        mean = b.mean().to(compute)
    elif "norm_mean" in tensors:
        mean = tensors["norm_mean"]
    # The mean that the kernel is told is part of the rounded inputs.
    given_inputs = dict(tensors, x=x, weight=weight)
    if mean is not None:
        given_inputs["norm_mean"] = mean
    rest = {key: value for key, value in options.items() if key != "norm_mean"}
    wide = {key: t.double() for key, t in given_inputs.items()}
    truth = reference_call(problem.delta)(**wide, **rest)
    peer = reference_call(problem.delta)(**given_inputs, **rest)
    a = ops.filter_norm(weight, problem.operator.eps)
    y, norm, dot = ops.conv2d_one_pass(
        x,
        weight,
        a,
        given,
        tensors.get("bias"),
        tensors.get("radius"),
        mean,
        tensors.get("k"),
        *geometry_of(problem),
        problem.operator.magnitude,
        problem.operator.angular,
        problem.operator.weighting,
        problem.operator.alpha,
        problem.operator.beta,
        problem.operator.power,
        problem.delta,
        problem.operator.eps,
        batch,
        not batch,
        keep_dot,
        kernel,
        tile,
        last,
    )
    check(f"{name}: y", y, truth, peer, dtype)
    assert y.is_contiguous(memory_format=layout_of(last))
    if batch:
        assert norm.numel() == 0
    else:
        peer_b = reference.window_norm(x, size, problem)
        check(f"{name}: b", from_map(norm, b, last), b, peer_b, dtype)
    if keep_dot:
        padded = [reference.padded(t, problem) for t in (x.double(), x)]
        truth, peer = (
            F.conv2d(
                t,
                w,
                None,
                problem.window.stride,
                pad,
                problem.window.dilation,
                problem.window.groups,
            )
            for (t, pad), w in zip(padded, (weight.double(), weight), strict=True)
        )
        check(f"{name}: u", dot, truth, peer, dtype)
    else:
        assert dot.numel() == 0


def gradients(
    x: Tensor, weight: Tensor, grad_u: Tensor, tap: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """dx and the library's dw in float64, by autograd: the derivative of the norms' part is x t."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    padded, padding = reference.padded(x, problem)
    geometry = (problem.window.stride, padding, problem.window.dilation, problem.window.groups)
    u = F.conv2d(padded, weight, None, *geometry)
    ones = torch.ones(
        (problem.window.groups, *weight.shape[1:]), dtype=torch.float64, device=weight.device
    )
    squares = F.conv2d(padded.square(), ones, None, *geometry)
    loss = (u * grad_u.double()).sum() + 0.5 * (squares * tap.double()).sum()
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    return grad_x, grad_weight


def random_backward(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Problem]:
    """du in x's dtype; t, b and sigma in compute dtype; all as [n, channels or groups, p, q]."""
    problem = problem_of(inputs)
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    b = reference.window_norm(x, (weight.shape[2], weight.shape[3]), problem)
    generator = torch.Generator().manual_seed(3)
    shape = (b.shape[0], case.o, *b.shape[2:])
    grad_u = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype)
    t = torch.randn(b.shape, generator=generator, dtype=torch.float64).to(b.dtype)
    return grad_u, t, b, torch.tensor(0.7, dtype=b.dtype), problem
