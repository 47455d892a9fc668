"""The op affine_relu on the CPU: values, rounding, layouts, threads, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import affine
import pytest
import torch
from cases import DTYPES

from dcconv.operator.numerics import compute_dtype

pytestmark = pytest.mark.backend("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(isa: str, dtype: torch.dtype, last: bool, deterministic: bool) -> None:
    for sizes, groups in affine.PROBLEMS:
        call = affine.operands(sizes, groups, dtype, last)
        affine.check_values(f"{isa} {sizes} {groups}", call, affine.op(call))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_any_address(dtype: torch.dtype, last: bool) -> None:
    """x that begins one element after a multiple of 64 bytes; scale and shift with gaps."""
    for sizes, groups in affine.PROBLEMS[:4]:
        call = affine.operands(sizes, groups, dtype, last)
        moved = affine.moved(call)
        assert moved.x.data_ptr() % 64 != 0 and not moved.scale.is_contiguous()
        for one, two in zip(affine.op(call), affine.op(moved), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(isa: str, dtype: torch.dtype, last: bool) -> None:
    affine.check_special_values(affine.op, dtype, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_product_is_rounded_once(isa: str, dtype: torch.dtype) -> None:
    """All 2^16 numbers times one, and times a number that leaves something to round."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = values[values.isfinite()].reshape(1, 1, 1, -1)
    for factor in (1.0, 1.0009765625, 0.3333333432674408):
        scale = torch.tensor([factor])
        y, _ = affine.op(affine.AffineRelu(x, scale, torch.zeros(1), 1, False))
        assert torch.equal(y, (x.float() * scale).to(dtype).relu())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_same_bits_at_any_number_of_threads(last: bool, threads: int) -> None:
    for dtype in DTYPES:
        call = affine.operands((3, 24, 41, 37), 2, dtype, last)
        many = affine.op(call)
        torch.set_num_threads(1)
        one = affine.op(call)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, last: bool) -> None:
    for sizes, groups in affine.PROBLEMS:
        torch.library.opcheck(
            torch.ops.dcconv.affine_relu.default,
            tuple(affine.operands(sizes, groups, dtype, last)),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("meta", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize("name", affine.REFUSALS)
def test_refusals(name: str, meta: bool) -> None:
    call, words = affine.refused(name)
    if meta:
        if name in affine.NOT_OF_FAKES:
            pytest.skip("fakes know neither strides nor dtypes that no kernel has")
        call = affine.AffineRelu(*(t.to("meta") for t in call[:3]), *call[3:])
        words = words.replace("float", r"(torch\.)?float")
    with pytest.raises(RuntimeError, match=rf"^dcconv: {words}$"):
        affine.op(call)


def test_compute_dtype_of_the_results() -> None:
    for dtype in DTYPES:
        y, sums = affine.op(affine.operands((1, 4, 2, 2), 1, dtype, False))
        assert (y.dtype, sums.dtype) == (dtype, compute_dtype(dtype))
