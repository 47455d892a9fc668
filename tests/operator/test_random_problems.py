"""Random problems under the accuracy rule: few products, aligned vectors, constant operands."""

from __future__ import annotations

import pytest
import torch
from accuracy import evaluate, judge, random_cotangent
from cases import Inputs, by_id, make_inputs
from random_problems import ALIGNED, SATURATED, RandomProblem, problem

from dcconv import functional

# A bounded number, in parts that can run in several processes.
PARTS, PER_PART = 8, 50


def compare(backend: str, drawn: RandomProblem, device: str) -> None:
    tensors = {name: t.to(device) for name, t in drawn.inputs.tensors.items()}
    inputs = Inputs(tensors if device != "cpu" else drawn.inputs.tensors, drawn.inputs.options)
    cotangent = random_cotangent(inputs)
    got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend=backend)
    judge(drawn.name, inputs, cotangent, got)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems_keep_the_rule(backend: str, device: str, part: int) -> None:
    for number in range(part * PER_PART, (part + 1) * PER_PART):
        compare(backend, problem(number), device)


@pytest.mark.parametrize("number", ALIGNED)
def test_aligned_vectors_keep_the_rule_of_their_condition(
    backend: str, device: str, number: int
) -> None:
    compare(backend, problem(number), device)


@pytest.mark.parametrize("number", SATURATED)
def test_gradients_of_a_saturated_tanh(backend: str, device: str, number: int) -> None:
    compare(backend, problem(number), device)


@pytest.mark.parametrize("keep", ["output", "dot"])
@pytest.mark.parametrize("weighting", ["none", "product", "separate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_radius_near_saturation_whatever_is_kept(
    backend: str, device: str, dtype: torch.dtype, weighting: str, keep: str
) -> None:
    """z = b / rho from 2 to 60: slopes down to 1e-51, and no float32 number below 1e-38."""
    for radius in (0.5, 0.1, 0.05, 0.02, 0.0175):
        inputs = make_inputs(
            by_id("3x3-p1"), dtype, norm="given", weighting=weighting, device=device
        )
        x = inputs.tensors["x"]
        filled = torch.where(x == 0, torch.ones_like(x), x)  # no zero patch, which never saturates
        tensors = inputs.tensors | {
            "x": filled,
            "radius": torch.full_like(inputs.tensors["radius"], radius),
        }
        inputs = Inputs(tensors, inputs.options)
        cotangent = random_cotangent(inputs)
        got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend=backend, keep=keep)
        judge(f"radius {radius}", inputs, cotangent, got)
