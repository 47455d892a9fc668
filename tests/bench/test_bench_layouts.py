"""What every provider of the operator benchmark returns is laid out as F.conv2d's is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bench.cases import MODES, Case, make_inputs, select
from bench.layers import Layer
from bench.options import BOTH, LAYOUTS
from bench.providers import COMPILED, COMPILED_EAGER, CONV2D, PROVIDERS, run
from dcconv import backends
from dcconv.operator.functions import angulars, magnitudes

LAYERS = (
    Layer(2, 8, 6, 4, 3),
    Layer(2, 8, 7, 8, 3, stride=2, groups=8),
    Layer(2, 8, 7, 16, 3, groups=8),
    Layer(1, 8, 7, 16, 3, groups=4),
    Layer(2, 8, 9, 6, 3, dilation=2, groups=2),
    Layer(2, 8, 6, 4, 1, stride=2),
    Layer(2, 3, 8, 6, 4, stride=4),
)

EAGERLY = [name for name, provider in PROVIDERS.items() if not provider.compiles]


def layout(t: Tensor) -> list[int | None]:
    """Return the strides of the axes that have one: that of an axis of one element is nothing."""
    return [stride if size > 1 else None for size, stride in zip(t.shape, t.stride(), strict=True)]


def check_layouts(name: str, case: Case, but: Sequence[str] = ()) -> None:
    inputs = make_inputs(case)
    found = run(PROVIDERS[name].build(case), inputs, BOTH)
    for part, want in run(PROVIDERS[CONV2D].build(case), inputs, BOTH).items():
        if part not in but:
            assert layout(found[part]) == layout(want), f"{name}, {case.name}: {part}"


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("name", EAGERLY)
def test_providers_keep_the_layout(name: str, layer: Layer, order: str) -> None:
    backend = PROVIDERS[name].backend
    reason = backend and backends.why_not(backend, torch.zeros(1))
    if reason:
        pytest.skip(reason)
    # Every magnitude, and every angular function, with a radius and without.
    operators = {f"{magnitude}-cosine" for magnitude in magnitudes}
    operators |= {f"{h}-{angular}" for h in ("tanh", "log") for angular in angulars}
    cases = select([layer], sorted(operators), MODES, ["float32"], [order])
    refusals = []
    for case in cases:
        try:
            check_layouts(name, case)
        except NotImplementedError as refusal:
            # A strategy by itself says which calls it does not compute.
            assert name.partition(f"{backend}-")[2], name
            refusals.append(str(refusal))
    if len(refusals) == len(cases):
        pytest.skip(refusals[0])


@pytest.mark.parametrize(
    ("name", "order"),
    [(COMPILED, "channels_last"), (COMPILED, "contiguous"), (COMPILED_EAGER, "channels_last")],
)
def test_compiled_providers_keep_the_layout(name: str, order: str) -> None:
    """Gradients of a contiguous image are left out: Inductor lays out those of F.conv2d anew."""
    (case,) = select([LAYERS[0]], ["tanh-cosine"], ["fixed"], ["float32"], [order])
    check_layouts(name, case, () if order == "channels_last" else ("grad_x", "grad_weight"))
