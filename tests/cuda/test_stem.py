"""The stem CUDA kernel in the SIMT model: few channels, tensor cores for the 16-bit types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, OPERATORS, Case, make_inputs
from direct_ops import check_forward, emulated_ops

NORMS = ("batch", "given", "none")

# Tiles of 64 positions with tails, more tiles than blocks, filters in more than one chunk, sums of
# every length around the 16 of a product, filters that are no vectors.
CASES = (
    Case("7x7-s2", 1, 3, 23, 21, 64, (7, 7), stride=2, padding=3),
    Case("3x3-s2", 2, 3, 11, 12, 32, (3, 3), stride=2, padding=1),
    Case("3x3-96", 1, 3, 9, 8, 96, (3, 3), padding=1),
    Case("4x4-s4", 2, 3, 16, 12, 96, (4, 4), stride=4),
    Case("2x2-c4", 1, 4, 6, 5, 12, (2, 2), padding=1),
    Case("5x3-c1", 1, 1, 9, 8, 5, (5, 3), stride=(1, 2), padding=(2, 0)),
    Case("dilation2", 1, 2, 9, 8, 66, (3, 3), padding=2, dilation=2),
    Case("padding-beyond-kernel", 1, 3, 4, 4, 8, (2, 2), padding=3),
    Case("same-s2", 1, 3, 8, 9, 16, (3, 3), stride=2, padding="same"),
    Case("tiles", 3, 1, 20, 17, 4, (3, 3), padding=1),
    Case("one-pixel", 1, 3, 3, 3, 7, (3, 3)),
    Case("n0", 0, 3, 6, 5, 4, (3, 3), padding=1),
    Case("reflect", 1, 3, 6, 7, 8, (3, 3), padding=2, padding_mode="reflect"),
    Case("circular", 1, 2, 5, 6, 8, (3, 3), padding=2, padding_mode="circular"),
)


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[Any]:
    with emulated_ops() as loaded:
        yield loaded


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_agrees_with_the_reference(case: Case, ops: Any) -> None:
    for i, dtype in enumerate(DTYPES):
        if dtype == torch.float64 and case.kernel == (7, 7):
            continue  # its taps do not fit in shared memory
        for last in (False, True):
            place = 7 * CASES.index(case) + 13 * i + 3 * last
            magnitude, weighting, angular = OPERATORS[37 * place % len(OPERATORS)]
            inputs = make_inputs(
                case,
                dtype,
                magnitude=magnitude,
                weighting=weighting,
                angular=angular,
                norm=NORMS[place % 3],
                bias=place % 4 == 0,
                scalar=place % 5 == 0,
            )
            name = f"{case.id} {dtype} {last} {magnitude} {weighting} {angular}"
            check_forward(ops, "stem", name, inputs, last, keep_dot=place % 2 == 0)


@pytest.mark.parametrize("operator", OPERATORS[::3], ids="-".join)
def test_operator_agrees_with_the_reference(operator: tuple[str, str, str], ops: Any) -> None:
    magnitude, weighting, angular = operator
    for i, norm in enumerate(NORMS):
        inputs = make_inputs(
            CASES[1],
            (torch.float16, torch.bfloat16, torch.float32)[i],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            alpha=1.25,
            beta=0.75,
            power=2.5,
        )
        check_forward(ops, "stem", norm, inputs, last=True, keep_dot=True)


def test_large_float16_inputs_do_not_overflow(ops: Any) -> None:
    inputs = make_inputs(CASES[1], torch.float16, magnitude="log", norm="none")
    inputs.tensors["x"].mul_(300)
    check_forward(ops, "stem", "300", inputs, last=True, keep_dot=False)


@pytest.mark.parametrize(
    "case",
    [
        Case("taps", 1, 4, 20, 20, 4, (13, 13)),
        Case("groups", 1, 4, 5, 5, 4, (3, 3), groups=2),
    ],
    ids=lambda case: case.id,
)
def test_guards(case: Case, ops: Any) -> None:
    inputs = make_inputs(case, torch.float32)
    with pytest.raises(RuntimeError, match="dcconv: a stem must have one group and few taps"):
        check_forward(ops, "stem", case.id, inputs, True, keep_dot=False)
