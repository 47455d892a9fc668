"""The op affine_relu of CUDA, its sources run in the SIMT model: values, layouts, refusals."""

from __future__ import annotations

from typing import Any

import affine
import builds
import pytest
import torch
from affine import AffineRelu
from cases import DTYPES
from emulated import ops_library

from dcconv import native
from dcconv.passes import ops

#: Besides those of every library: enough rows for four at a time, of one vector, of more and of
#: several groups, rows that are not there among them; more tiles than blocks.
PROBLEMS: tuple[tuple[tuple[int, int, int, int], int], ...] = (
    ((2, 16, 23, 21), 1),
    ((1, 80, 37, 17), 1),
    ((1, 32, 21, 26), 2),
    ((1, 6, 31, 33), 1),
    ((1, 6, 31, 33), 3),
    ((3, 8, 28, 26), 1),
)

LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def overload() -> Any:
    reason = builds.why_not(builds.FAST) or native.missing
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(ops_library()))
    return torch.ops.dcconv_simt.affine_relu.default


@LAYOUTS
@EVERY_DTYPE
def test_values(overload: Any, dtype: torch.dtype, last: bool, deterministic: bool) -> None:
    for sizes, groups in (*affine.PROBLEMS, *PROBLEMS):
        call = affine.operands(sizes, groups, dtype, last)
        affine.check_values(f"{sizes} {groups}", call, overload(*call))


@LAYOUTS
@EVERY_DTYPE
def test_views_at_any_address(overload: Any, dtype: torch.dtype, last: bool) -> None:
    """Single elements in the place of vectors: sums are added up in another order."""
    for sizes, groups in (*affine.PROBLEMS[:4], *PROBLEMS):
        call = affine.moved(affine.operands(sizes, groups, dtype, last))
        assert call.x.data_ptr() % 16 != 0
        affine.check_values(f"{sizes} {groups}", call, overload(*call))
    # Values of channels that vectors do not reach.
    scale = torch.cat((call.scale[:1], call.scale))[1:]
    assert scale.is_contiguous() and scale.data_ptr() % 16 != 0
    call = affine.operands(*PROBLEMS[0], dtype, last)
    moved = call._replace(scale=torch.cat((call.scale[:1], call.scale))[1:])
    affine.check_values("scale", moved, overload(*moved))


@LAYOUTS
@EVERY_DTYPE
def test_nan_and_infinity(overload: Any, dtype: torch.dtype, last: bool) -> None:
    affine.check_special_values(lambda call: overload(*call), dtype, last)


@pytest.mark.parametrize("name", affine.REFUSALS)
def test_refusals(overload: Any, name: str) -> None:
    call, words = affine.refused(name)
    with pytest.raises(RuntimeError, match=rf"^dcconv: {words}$"):
        overload(*call)


def test_sizes_of_more_than_32_bits_are_refused(overload: Any) -> None:
    x = torch.empty(0, 2, 2**20, 2**12)
    call = AffineRelu(x, torch.ones(2), torch.zeros(2), 1, False)
    with pytest.raises(
        RuntimeError, match=r"^dcconv: a size must be below 2\^31 on a GPU, got 4294967296$"
    ):
        overload(*call)


def test_the_schema_is_that_of_the_record(overload: Any) -> None:
    schema = torch._C.parse_schema(f"dcconv_simt::affine_relu{ops.affine_relu.schema}")
    assert str(overload._schema) == str(schema)
