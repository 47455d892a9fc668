"""The checks of the GPU gate as tests, on machines with a GPU."""

from __future__ import annotations

import pytest
import torch
from gate.checks import Where
from gate.environment import why_no_gpu
from gate.report import FAILED, NOT_RUN
from gate.worker import answer
from gpu_gate import FIRST, checks_of

from dcconv import native

reason = why_no_gpu() or native.cuda_missing()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.mark.parametrize("name", FIRST)
def test_check_of_the_gate(name: str) -> None:
    # Tensors beyond 2^31 elements only where the whole gate runs.
    if name.startswith("over 2^31") and torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("it needs 60 GiB of GPU memory")
    check, _ = checks_of(Where("cuda", "cuda", reduced=True))[name]
    row = answer(name, check)
    if row.state == NOT_RUN:
        pytest.skip(row.message)
    assert row.state != FAILED, row.message
