"""The model of a multiprocessor: what it is made of, and what it is held against."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listings import kernel

from bench.machine import listing, selfcheck
from bench.machine.gpus import GPUS, Gpu
from bench.machine.simulate import Simulated, simulate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the model")

H200, A100 = GPUS["H200"], GPUS["A100"]
ITEM = [("place", "<i4"), ("sectors", "<i4"), ("amount", "<i4"), ("address", "<i8")]

#: Where tests have a stream.
STREAM = [(1 << 20, 1 << 40)]


def trace(length: int, repeat: int = 1, addresses: Any = 0, bytes_each: int = 512) -> Any:
    """Return a warp's items: all instructions in turn, memory at rising addresses."""
    items = np.zeros(length * repeat, ITEM)
    items["place"] = np.tile(np.arange(length), repeat)
    if addresses:
        items["address"] = addresses + bytes_each * np.arange(length * repeat)
        items["amount"], items["sectors"] = bytes_each, bytes_each // 32
    return items


def run(
    instructions: Sequence[Any], warps: int = 4, gpu: Gpu = H200, repeat: int = 1000, **options: Any
) -> Simulated:
    code = kernel([*instructions], arch=gpu.arch)
    traces = options.pop("traces", None) or [trace(len(code.code), repeat)] * warps
    given: dict[str, Any] = {"resident": 1, "blocks": 1, **options}
    return simulate(code, traces, gpu, warps, **given)


def per_instruction(found: Simulated, warps: int = 4) -> float:
    return found.cycles / (found.issued / warps)


def test_a_scheduler_issues_one_instruction_a_cycle() -> None:
    # Two warps on each of four schedulers, of which one alone would wait two cycles.
    code = [("FFMA R0, R1, R2, R3", "stall=2"), ("FMUL R4, R5, R6", "stall=2")]
    assert per_instruction(run(code, warps=4)) == pytest.approx(2, rel=0.02)
    assert per_instruction(run(code, warps=8), 8) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("text", "gpu", "cycles"),
    [
        *(("FFMA R0, R1, R2, R3", H200, 1), ("FFMA R0, R1, R2, R3", A100, 2)),
        *(("IMAD R0, R1, R2, R3", H200, 2), ("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", H200, 2)),
        *(("MUFU.RCP R0, R1", H200, 8), ("HMMA.16816.F32 R0, R4, R8, R0", H200, 6.4)),
        *(("HMMA.16816.F32 R0, R4, R8, R0", A100, 8), ("DADD R0, R2, R4", H200, 2)),
    ],
)
def test_pipes_take_their_cycles(text: str, gpu: Gpu, cycles: float) -> None:
    found = run([text], warps=16, gpu=gpu)
    assert per_instruction(found, 4) == pytest.approx(cycles, rel=0.03)


def test_a_scoreboard_is_awaited() -> None:
    code = [("MUFU.RCP R0, R1", "written=0"), ("FADD R0, R0, R0", "wait=1")]
    found = run(code, warps=4)
    assert per_instruction(found) == pytest.approx((22 + 1) / 2, rel=0.05)
    assert found.waiting[1] > 0.8


def test_a_load_takes_the_latency_of_where_it_comes_from() -> None:
    code = [("LDG.E.128 R0, desc[UR4][R2.64]", "written=0"), ("MOV R1, R0", "wait=1")]
    one = [trace(2, 20, 1 << 30)]
    for streams, latency in (((), H200.latency[1]), (STREAM, 1000), (STREAM, 700)):
        found = run(code, warps=1, traces=one, streams=streams, dram_latency=latency)
        assert found.cycles / 20 == pytest.approx(latency, rel=0.1)
    again = [trace(2, 20, 1 << 30, 512)]
    again[0]["address"] = 1 << 30
    assert run(code, warps=1, traces=again).cycles / 20 < 80  # from L1


def test_dram_gives_its_rate_and_no_more() -> None:
    code = [("LDG.E.128 R0, desc[UR4][R2.64]", "written=0"), ("EXIT", "wait=1")]
    traces = [trace(1, 401, (1 << 30) + (w << 24)) for w in range(32)]
    for items in traces:
        items[-1] = 1, 0, 0, 0
    found = run(code, warps=32, traces=traces, streams=STREAM)
    assert found.dram_bytes == 32 * 400 * 512
    assert found.dram_bytes / found.cycles == pytest.approx(H200.bytes_per_cycle, rel=0.02)
    assert found.in_flight > H200.bytes_per_cycle * 1000


def test_shared_memory_takes_its_passes() -> None:
    traces = [trace(1, 200) for _ in range(8)]
    for items in traces:
        items["amount"] = 4
    found = run(["LDS R0, [R1]"], warps=8, traces=traces)
    assert found.cycles == pytest.approx(8 * 200 * 4, rel=0.03)


def test_a_barrier_waits_for_the_last_warp() -> None:
    code = kernel(["MOV R0, R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"])
    late = np.zeros(502, ITEM)
    late["place"][-2:] = 1, 2
    early = late[-3:].copy()
    found = simulate(code, [late, early, early, early], H200, 4, 1, 1)
    assert 2 * 500 < found.cycles < 2 * 500 + 60
    assert found.waiting[4] > 0.6


def test_blocks_that_do_not_fit_run_afterwards() -> None:
    code, traces = kernel([("MOV R0, R1", "stall=4")]), [trace(1, 500)] * 4
    alone = simulate(code, traces, H200, 4, 1, 1).cycles
    assert simulate(code, traces, H200, 4, 2, 2).cycles == pytest.approx(alone, rel=0.01)
    assert simulate(code, traces, H200, 4, 2, 3).cycles == pytest.approx(2 * alone, rel=0.05)


def test_taken_branches_cost_more() -> None:
    straight = run([("BRA 0x0", "stall=5"), ("MOV R0, R1", "stall=5")], repeat=1, warps=4)
    around = run([("BRA 0x0", "stall=5")], repeat=2, warps=4)
    assert around.cycles - straight.cycles == 4


def test_copies_are_awaited_by_groups() -> None:
    code = kernel(
        [
            *("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1"),
            "EXIT",
        ]
    )
    one = trace(3, 50, 1 << 30)
    ahead = simulate(code, [one], H200, 1, 1, 1, STREAM).cycles
    strict = kernel([*(i.text for i in code.code[:2]), "DEPBAR.LE SB0, 0x0"])
    assert simulate(strict, [one], H200, 1, 1, 1, STREAM).cycles > 1.8 * ahead


@pytest.mark.parametrize("name", selfcheck.COPY_GPUS)
def test_a_copy_runs_at_the_rate_of_memory(name: str) -> None:
    assert selfcheck.copy_share(GPUS[name]) == pytest.approx(1, abs=selfcheck.COPY_TOLERANCE)


@pytest.mark.parametrize("product", selfcheck.PRODUCTS, ids=lambda p: p.kernel)
def test_published_products_are_within_a_quarter(product: selfcheck.Product) -> None:
    found = selfcheck.product_rate(product, GPUS["H100"])
    assert found == pytest.approx(product.measured, rel=selfcheck.PRODUCT_TOLERANCE)


def test_a_listing_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kernels.txt"
    path.write_text(listing.write(listing.read(selfcheck.LISTING)))
    assert path.read_text() == selfcheck.LISTING.read_text()
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="dcconv: listing must have kernels, got "):
        listing.read(path)
