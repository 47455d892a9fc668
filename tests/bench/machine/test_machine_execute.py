"""Executed machine code: instructions, divergence, barriers, memory and its bounds."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from listings import kernel

from bench.machine.disassemble import Kernel
from bench.machine.execute.grid import STACK_TOP, Launch
from bench.machine.execute.run import Runner

ONE = 0x3F800000


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def runner(
    code: Kernel | Sequence[Any],
    arrays: Sequence[Any] = (),
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
    parameters: bytes = b"",
    traced: bool = False,
) -> Runner:
    made = code if isinstance(code, Kernel) else kernel(code)
    launch = Launch("kernel", "kernel", (blocks, 1), threads, shared, parameters)
    return Runner(made, launch, arrays, traced=traced)


def after(code: Sequence[Any], given: Mapping[int, Any], **options: Any) -> Runner:
    """Run with the registers given by number, of a warp."""
    one = runner([*code, "EXIT"], **options)
    for number, value in given.items():
        one.grid.registers[number] = value
    one.run()
    return one


BIG, MINUS = 0x80000001, 0xFFFFFFFF

INSTRUCTIONS = [
    ("MOV R0, R1", {1: 7}, 7),
    ("MOV R0, 0x12", {}, 0x12),
    ("IADD3 R0, R1, R2, R3", {1: MINUS, 2: 3, 3: 4}, 6),
    ("IADD3 R0, R1, -R2, RZ", {1: 3, 2: 5}, 0xFFFFFFFE),
    ("VIADD R0, R1, 0xffffffff", {1: 5}, 4),
    ("IMAD R0, R1, R2, R3", {1: 0x10001, 2: 0x10001, 3: 1}, 0x20002),
    ("IMAD.MOV.U32 R0, RZ, RZ, R1", {1: 9}, 9),
    ("IMAD.HI.U32 R0, R1, R2, RZ", {1: MINUS, 2: 4}, 3),
    ("IMAD.HI R0, R1, R2, RZ", {1: MINUS, 2: 4}, MINUS),
    ("LEA R0, R1, R2, 0x4", {1: 3, 2: 5}, 53),
    ("LEA.HI R0, R1, R2, RZ, 0x5", {1: 0xF8000000, 2: 1}, 32),
    ("SHF.L.U32 R0, R1, 0x4, RZ", {1: 0xF0000001}, 0x10),
    ("SHF.R.U32.HI R0, RZ, R2, R1", {1: BIG, 2: 40}, 0),
    ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {1: BIG}, MINUS),
    ("SHF.L.U64.HI R0, R1, 0x4, R2", {1: 0xF0000000, 2: 1}, 0x1F),
    ("SHF.R.U64 R0, R1, 0x8, R2", {1: 0x100, 2: 0x3}, 0x03000001),
    ("SHF.R.S64 R0, R1, 0x8, R2", {1: 0x100, 2: BIG}, 0x01000001),
    ("SGXT R0, R1, 0x3", {1: 0xD}, MINUS - 2),
    ("SGXT R0, R1, 0x3", {1: 0xB}, 3),
    ("SGXT.U32 R0, R1, 0x3", {1: 0xD}, 5),
    ("SGXT R0, R1, R2", {1: BIG, 2: 32}, BIG),
    ("SGXT R0, R1, R2", {1: BIG, 2: 0}, 0),
    ("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", {1: 12, 2: 10}, 8),
    ("LOP3.LUT R0, R1, R2, R3, 0x6a, !PT", {1: 12, 2: 10, 3: 1}, 9),
    ("LOP3.LUT R0, RZ, R1, RZ, 0x33, !PT", {1: 0}, MINUS),
    ("PRMT R0, R1, 0x5410, R2", {1: 0x11112222, 2: 0x33334444}, 0x44442222),
    ("PRMT R0, R1, 0x7632, R2", {1: 0x11112222, 2: 0x33334444}, 0x33331111),
    ("PRMT R0, R1, 0x8880, RZ", {1: 0x80}, 0xFFFFFF80),
    ("IABS R0, R1", {1: MINUS}, 1),
    ("IMNMX R0, R1, R2, PT", {1: MINUS, 2: 1}, MINUS),
    ("IMNMX.U32 R0, R1, R2, PT", {1: MINUS, 2: 1}, 1),
    ("VIADDMNMX.U32 R0, R1, R2, R3, !PT", {1: 2, 2: 3, 3: 4}, 5),
    ("SEL R0, R1, R2, !PT", {1: 1, 2: 2}, 2),
    ("FADD R0, R1, -R2", {1: bits(1.5), 2: bits(0.25)}, bits(1.25)),
    ("FADD R0, |R1|, 2.5", {1: bits(-1.5)}, bits(4)),
    ("FMUL R0, R1, 3", {1: bits(1.5)}, bits(4.5)),
    ("FMUL.FTZ R0, R1, R2", {1: bits(1e-30), 2: bits(1e-10)}, 0),
    ("FFMA R0, R1, R2, R3", {1: 0x3F800001, 2: 0x3F800001, 3: bits(-1)}, 0x34800000),
    ("FFMA.RP R0, R1, R2, R3", {1: ONE, 2: bits(1e-10), 3: ONE}, 0x3F800001),
    ("FFMA.RM R0, R1, -R2, R3", {1: ONE, 2: bits(1e-10), 3: ONE}, 0x3F7FFFFF),
    ("FFMA.RZ R0, R1, -R2, R3", {1: ONE, 2: bits(1e-10), 3: ONE}, 0x3F7FFFFF),
    ("FMNMX R0, R1, R2, PT", {1: 0x7FC00000, 2: ONE}, ONE),
    ("FSEL R0, -R1, RZ, PT", {1: ONE}, bits(-1)),
    ("MUFU.RCP R0, R1", {1: bits(4)}, bits(0.25)),
    ("MUFU.RSQ R0, R1", {1: bits(4)}, bits(0.5)),
    ("MUFU.EX2 R0, R1", {1: bits(3)}, bits(8)),
    ("MUFU.EX2 R0, R1", {1: bits(-127)}, 0),
    ("MUFU.LG2 R0, R1", {1: bits(8)}, bits(3)),
    ("MUFU.LG2 R0, R1", {1: bits(0)}, bits(-np.inf)),
    ("MUFU.SQRT R0, R1", {1: bits(9)}, bits(3)),
    ("MUFU.TANH R0, R1", {1: bits(0.5)}, bits(np.tanh(0.5))),
    ("MUFU.TANH R0, R1", {1: 1}, 1),
    ("MUFU.RCP R0, R1", {1: 1}, bits(np.inf)),
    ("FFMA.FTZ R0, R1, R2, R3", {1: 1, 2: bits(2.0**100), 3: 0}, 0),
    ("FMNMX.NAN R0, R1, R2, PT", {1: bits(np.nan), 2: bits(2)}, bits(np.nan)),
    ("I2FP.F32.S32 R0, R1", {1: MINUS}, bits(-1)),
    ("I2F.RP R0, R1", {1: 0x1000001}, 0x4B800001),
    ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {1: bits(5.9)}, 5),
    ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {1: bits(-2)}, 0),
    ("FRND R0, R1", {1: bits(2.5)}, bits(2)),
    ("F2FP.BF16.F32.PACK_AB R0, R1, R2", {1: bits(1), 2: 0x3F808000}, 0x3F803F80),
    ("F2FP.F16.F32.PACK_AB R0, RZ, R1", {1: bits(1.5)}, 0x3E00),
    ("F2FP.RELU.BF16.F32.PACK_AB R0, R1, R2", {1: bits(-1), 2: 0x3F808000}, 0x3F80),
    ("F2FP.RELU.F16.F32.PACK_AB R0, R1, R2", {1: 0x7FC00000, 2: bits(-2)}, 0x7E000000),
    ("F2F.BF16.F32 R0, R1", {1: 0x3F818000}, 0x3F82),
    ("HADD2.F32 R0, -RZ, R1.H1_H1", {1: 0x3E000000}, bits(1.5)),
    ("HFMA2.MMA R0, -RZ, RZ, 1.5, 2", {}, 0x3E004000),
    ("CS2R.32 R0, SRZ", {0: 5}, 0),
]


@pytest.mark.parametrize(("text", "given", "expected"), INSTRUCTIONS, ids=lambda v: str(v)[:40])
def test_instructions(text: str, given: dict[int, int], expected: int) -> None:
    found = after([text], given).grid.registers[0]
    assert [hex(v) for v in set(found.tolist())] == [hex(expected)]


PAIRS = [
    ("IMAD.WIDE.U32 R0, R2, R3, R4", {2: MINUS, 3: MINUS, 4: 1, 5: 0}, 0xFFFFFFFE00000002),
    ("IMAD.WIDE R0, R2, R3, R4", {2: MINUS, 3: 4, 4: 0, 5: 1}, 0xFFFFFFFC),
    ("DADD R0, R2, -R4", {2: 0, 3: 0x40080000, 4: 0, 5: 0x3FF00000}, 0x4000000000000000),
    ("DMUL R0, R2, 0.5", {2: 0, 3: 0x40080000}, 0x3FF8000000000000),
    ("F2F.F64.F32 R0, R2", {2: bits(1.5)}, 0x3FF8000000000000),
    ("F2I.U64.TRUNC R0, R2", {2: bits(2.0**33)}, 1 << 33),
    ("CS2R R0, SRZ", {0: 1, 1: 1}, 0),
]


@pytest.mark.parametrize(("text", "given", "expected"), PAIRS, ids=lambda v: str(v)[:40])
def test_instructions_of_pairs(text: str, given: dict[int, int], expected: int) -> None:
    low, high = (int(v) for v in after([text], given).grid.registers[:2, 0])
    assert hex(high << 32 | low) == hex(expected)


def test_a_fused_product_of_doubles_is_rounded_once() -> None:
    one = np.float64(1) + 2.0**-30
    low, high = (int(v) for v in np.array([one]).view(np.uint32))
    given = {2: low, 3: high, 4: 0, 5: 0xBFF00000}
    found = after(["DFMA R0, R2, R2, R4"], given).grid.registers[:2, 0]
    expected = 2.0**-29 + 2.0**-60
    assert np.ascontiguousarray(found).view(np.float64)[0] == expected


def test_a_carry_goes_on_in_the_upper_half() -> None:
    code = ["IADD3 R0, P0, R2, R4, RZ", "IADD3.X R1, R3, R5, RZ, P0, !PT"]
    found = after(code, {2: MINUS, 3: 1, 4: 1, 5: 2}).grid.registers[:2, 0]
    assert found.tolist() == [0, 4]
    code = ["IADD3 R0, P0, R2, R4, RZ", "IMAD.X R1, RZ, RZ, R3, P0"]
    assert after(code, {2: MINUS, 3: 1, 4: 1}).grid.registers[1, 0] == 2


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("ISETP.LT.AND P0, PT, R1, R2, PT", {1: MINUS, 2: 0}, True),
        ("ISETP.LT.U32.AND P0, PT, R1, R2, PT", {1: MINUS, 2: 0}, False),
        ("ISETP.GE.OR P0, PT, R1, R2, PT", {1: 0, 2: 1}, True),
        ("FSETP.GEU.AND P0, PT, R1, R2, PT", {1: 0x7FC00000, 2: ONE}, True),
        ("FSETP.NE.AND P0, PT, R1, R2, PT", {1: 0x7FC00000, 2: ONE}, False),
        ("FCHK P0, R1, R2", {1: ONE, 2: ONE}, False),
        ("FCHK P0, R1, R2", {1: ONE, 2: 1}, True),
        ("LOP3.LUT P0, RZ, R1, 0x2, RZ, 0xc0, !PT", {1: 3}, True),
    ],
    ids=lambda v: str(v)[:40],
)
def test_predicates(text: str, given: dict[int, int], expected: bool) -> None:
    assert set(after([text], given).grid.predicates[0].tolist()) == {expected}


def test_comparisons_of_pairs_begin_with_the_lower_half() -> None:
    code = ["ISETP.LT.U32.AND P0, PT, R2, R4, PT", "ISETP.LT.AND.EX P0, PT, R3, R5, PT, P0"]
    assert after(code, {2: 1, 3: 7, 4: 2, 5: 7}).grid.predicates[0].all()
    assert not after(code, {2: 2, 3: 7, 4: 2, 5: 7}).grid.predicates[0].any()


@pytest.mark.parametrize(
    ("relation", "lower", "upper", "expected"),
    [
        *(("EQ", 1, 7, True), ("EQ", 0, 7, False), ("EQ", 1, 6, False)),
        *(("NE", 1, 7, True), ("NE", 0, 7, False), ("NE", 0, 6, True)),
        *(("GE", 1, 7, True), ("GE", 0, 7, False), ("GE", 0, 6, True), ("GE", 1, 8, False)),
        *(("LE", 0, 7, False), ("LE", 0, 8, True)),
    ],
)
def test_equal_upper_halves_leave_it_to_the_lower(
    relation: str, lower: int, upper: int, expected: bool
) -> None:
    text = f"ISETP.{relation}.AND.EX P0, PT, R3, R5, PT, P1"
    one = runner([text, "EXIT"])
    one.grid.registers[3], one.grid.registers[5] = 7, upper
    one.grid.predicates[1] = bool(lower)
    one.run()
    assert set(one.grid.predicates[0].tolist()) == {expected}


LANES = np.arange(32, dtype=np.uint32)


def test_lanes_part_and_meet_again_before_they_exchange() -> None:
    code = [
        *("ISETP.GE.AND P0, PT, R1, 0x10, PT", "BSSY B0, @join@", "@P0 BRA @upper@"),
        *("IADD3 R2, R1, 0x64, RZ", "BRA @join@", "upper:", "IADD3 R2, R1, 0xc8, RZ"),
        *("join:", "BSYNC B0", "SHFL.BFLY PT, R3, R2, 0x10, 0x1f"),
    ]
    found = after(code, {1: LANES}).grid.registers
    own = LANES + np.where(LANES >= 16, 200, 100)
    assert (found[2] == own).all() and (found[3] == own[LANES ^ 16]).all()


def test_only_the_lanes_that_set_out_are_waited_for() -> None:
    code = [
        *("ISETP.GE.AND P0, PT, R1, 0x10, PT", "ISETP.GE.AND P1, PT, R1, 0x18, PT"),
        *("BSSY B0, @join@", "@!P0 BRA @join@", "BSSY B1, @inner@", "@P1 BRA @inner@"),
        *("IADD3 R2, R1, 0x1, RZ", "inner:", "BSYNC B1", "IADD3 R2, R2, 0x2, RZ"),
        *("join:", "BSYNC B0"),
    ]
    found = after(code, {1: LANES}).grid.registers[2]
    expected = np.where(LANES < 16, 0, np.where(LANES < 24, LANES + 3, 2))
    assert (found == expected).all()


def test_loops_of_different_lengths() -> None:
    code = [
        *("MOV R2, RZ", "top:", "IADD3 R2, R2, 0x1, RZ", "ISETP.LT.AND P0, PT, R2, R1, PT"),
        *("@P0 BRA @top@", "WARPSYNC.ALL", "IADD3 R3, R2, R2, RZ"),
    ]
    done = after(code, {1: LANES})
    assert (done.grid.registers[3] == 2 * np.maximum(LANES, 1)).all()
    assert done.issued[1] == 31  # as often as the lane with the longest way


def test_a_call_returns() -> None:
    code = [
        "MOV R4, 0x20",
        "@P0 CALL.REL.NOINC @f@",
        "EXIT",
        "f:",
        "MOV R0, 0x7",
        "RET.REL.NODEC R4 0x0",
    ]
    one = runner(code)
    one.grid.predicates[0] = LANES % 2 == 1
    one.run()
    assert one.grid.registers[0].tolist() == [0, 7] * 16


def test_a_jump_table() -> None:
    made = kernel(["BRX R2 -0x10", "MOV R0, 0x1", "EXIT", "MOV R0, 0x2", "EXIT"])
    one = runner(made)
    one.grid.registers[2] = np.where(LANES < 8, 0x10, 0x30)
    one.run()
    assert one.grid.registers[0].tolist() == [1] * 8 + [2] * 24


def test_nobody_waits_for_those_that_break_away() -> None:
    code = [
        *("ISETP.GE.AND P0, PT, R1, 0x10, PT", "BSSY B0, @join@", "@P0 BREAK B0"),
        *("@P0 BRA @away@", "MOV R2, 0x7", "join:", "BSYNC B0", "MOV R3, R2", "BRA @both@"),
        *("away:", "WARPSYNC.ALL", "both:", "IADD3 R3, R3, 0x1, RZ"),
    ]
    found = after([*code, "EXIT"], {1: LANES}).grid.registers
    assert (found[3] == np.where(LANES >= 16, 1, 8)).all()


def test_halves_of_words_go_to_the_stack_and_back() -> None:
    code = ["STL.U16 [R1+0x2], R2", "LDL.U16 R3, [R1+0x2]", "LDL R4, [R1]", "EXIT"]
    one = runner(dataclasses.replace(kernel(code), stack=16))
    one.grid.registers[1] = STACK_TOP - 16
    one.grid.registers[2] = 0x50000 + LANES
    one.run()
    assert (one.grid.registers[3] == LANES).all()
    assert (one.grid.registers[4] == LANES << 16).all()


def test_a_jump_table_for_a_whole_warp() -> None:
    one = runner(kernel(["BRXU UR2 -0x10", "MOV R0, 0x1", "EXIT", "MOV R0, 0x2", "EXIT"]))
    one.grid.uniform[2] = 0x30
    one.run()
    assert one.grid.registers[0].tolist() == [2] * 32


def test_a_block_meets_at_its_barrier() -> None:
    code = [
        *("S2R R0, SR_TID.X", "SHF.L.U32 R1, R0, 0x2, RZ", "STS [R1+0x400], R0"),
        *("BAR.SYNC.DEFER_BLOCKING 0x0", "LOP3.LUT R2, R1, 0x80, RZ, 0x3c, !PT"),
        "LDS R3, [R2+0x400]",
    ]
    one = after(code, {}, threads=64, blocks=2, shared=256)
    assert one.grid.registers[3].tolist() == 2 * [*range(32, 64), *range(32)]


def test_threads_that_wait_for_each_other_are_told() -> None:
    code = ["@P0 BRA @other@", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT", "other:", "WARPSYNC.ALL"]
    one = runner([*code, "EXIT"])
    one.grid.predicates[0] = LANES < 4
    with pytest.raises(ValueError, match="must have threads that do not wait"):
        one.run()


def test_uniform_registers_are_the_warps() -> None:
    code = ["S2UR UR4, SR_CTAID.X", "UIADD3 UR5, UR4, 0x7, URZ", "IMAD.U32 R0, RZ, RZ, UR5"]
    assert after(code, {}, blocks=2).grid.registers[0].tolist() == [7] * 32 + [8] * 32
    code = ["R2UR UR4, R1", "IMAD.U32 R0, RZ, RZ, UR4"]
    assert set(after(code, {1: LANES + 3}).grid.registers[0].tolist()) == {3}


COPY = [
    *("S2R R0, SR_CTAID.X", "S2R R1, SR_TID.X", "IMAD R0, R0, 0x20, R1", "MOV R4, c[0x0][0x210]"),
    *("MOV R5, c[0x0][0x214]", "IMAD.WIDE R2, R0, 0x4, R4", "LDG.E R6, desc[UR4][R2.64]"),
    *("MOV R4, c[0x0][0x218]", "MOV R5, c[0x0][0x21c]", "IMAD.WIDE R2, R0, 0x4, R4"),
    *("STG.E desc[UR4][R2.64], R6", "EXIT"),
]


def copying(size: int, blocks: int = 2, shift: int = 0) -> tuple[Runner, Any, Any]:
    source, target = np.arange(size, dtype=np.uint32), np.zeros(64, np.uint32)
    parameters = struct.pack("<2Q", source.ctypes.data + shift, target.ctypes.data)
    arrays = [source, target]
    return runner(COPY, arrays, blocks, parameters=parameters), source, target


def test_tensors_are_read_and_written() -> None:
    one, source, target = copying(64)
    one.run()
    assert (source == target).all()


def test_a_read_outside_of_the_tensors_stops_with_its_place() -> None:
    one, source, _ = copying(48)
    address = f"{source.ctypes.data + 4 * 48:#x}"
    sentence = (
        rf"dcconv: kernel kernel must load aligned 4 bytes of its tensors, got address {address} "
        r"in block \(1, 0\)"
    )
    with pytest.raises(ValueError, match=sentence):
        one.run()


def test_a_write_outside_of_the_tensors_stops_with_its_place() -> None:
    one, *_ = copying(96, blocks=3)
    with pytest.raises(ValueError, match=r"must store .* in block \(2, 0\)"):
        one.run()


def test_an_address_that_is_not_aligned_stops() -> None:
    one, *_ = copying(65, shift=2)
    with pytest.raises(ValueError, match="must load aligned 4 bytes"):
        one.run()


@pytest.mark.parametrize("text", ["LDS R0, [R1+0x400]", "STS [R1+0x400], R0", "LDS R0, [R1]"])
def test_shared_memory_has_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"aligned 16 bytes of its shared memory"):
        after(["LDS.128 R4, [R1+0x400]"], {1: 112}, shared=120)
    with pytest.raises(ValueError, match=r"of its shared memory, got address 0x[0-9a-f]+ in block"):
        after([text], {1: 128 + 4 * LANES}, shared=128)


@pytest.mark.parametrize(
    "text",
    [
        *("TEX R0, R1, R2", "MUFU.OTHER R0, R1", "LDC R0, c[0x4][0x8]", "S2R R0, SR_CLOCKLO"),
        *("HFMA2 R0, R1, R2, R3", "BAR.ARV 0x1", "HMMA.1688.F32 R0, R4, R6, R8"),
    ],
)
def test_an_instruction_that_is_not_known_is_named(text: str) -> None:
    sentence = "dcconv: an instruction must be one that the executor knows, got "
    with pytest.raises(ValueError, match=re.escape(sentence + text) + "$"):
        after([text], {})


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="dcconv: arch must be one of sm_80"):
        runner(kernel(["EXIT"], arch="sm_100"))


def test_copies_to_shared_memory_are_zero_where_they_read_nothing() -> None:
    source = np.arange(128, dtype=np.uint32)
    code = [
        "LDGSTS.E.BYPASS.128 [R1+0x400], desc[UR4][R2.64], P0",
        *("LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "LDS R0, [R1+0x40c]"),
    ]
    one = runner([*code, "EXIT"], [source], shared=512)
    address = source.ctypes.data + 16 * LANES.astype(np.uint64)
    one.grid.registers[1] = 16 * LANES
    one.grid.registers[2], one.grid.registers[3] = address & 0xFFFFFFFF, address >> 32
    one.grid.predicates[0] = LANES < 16
    one.run()
    assert one.grid.registers[0].tolist() == [4 * k + 3 for k in range(16)] + [0] * 16


@pytest.mark.parametrize("name", ["F32", "F32.BF16"])
def test_tensor_cores(name: str) -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(-4, 5, (16, 16)), random.integers(-4, 5, (16, 8))

    def word(low: Any, high: Any) -> Any:
        kind = np.float16 if name == "F32" else np.float32
        shift = 0 if name == "F32" else 16
        parts = [
            np.asarray(x).astype(kind).view(f"u{kind().itemsize}") >> shift for x in (low, high)
        ]
        return parts[0].astype(np.uint32) | parts[1].astype(np.uint32) << 16

    group, member = LANES // 4, LANES % 4
    given = {}
    for k in range(4):
        row, column = group + 8 * (k % 2), 2 * member + 8 * (k // 2)
        given[4 + k] = word(a[row, column], a[row, column + 1])
    for k in range(2):
        row = 2 * member + 8 * k
        given[8 + k] = word(b[row, group], b[row + 1, group])
    found = after([f"HMMA.16816.{name} R0, R4, R8, RZ"], given).grid.registers
    product = a @ b
    for k in range(4):
        expected = product[group + 8 * (k // 2), 2 * member + k % 2]
        assert (found[k].view(np.float32) == expected).all()


@pytest.mark.parametrize("kind", ["M88", "MT88"])
def test_matrices_are_loaded_from_shared_memory(kind: str) -> None:
    one = runner([f"LDSM.16.{kind}.4 R4, [R1+0x400]", "EXIT"], shared=512)
    one.grid.registers[1] = 16 * LANES
    elements = np.arange(256, dtype=np.uint16)
    one.memory.shared[0] = elements.view(np.uint8)
    one.run()
    matrices = elements.reshape(4, 8, 8)
    if kind == "MT88":
        matrices = matrices.transpose(0, 2, 1)
    for k in range(4):
        expected = np.ascontiguousarray(matrices[k]).view(np.uint32).ravel()
        assert (one.grid.registers[4 + k] == expected).all()


@pytest.mark.parametrize("kind", ["M88", "MT88"])
@pytest.mark.parametrize("count", [1, 4])
def test_matrices_come_back_as_they_were_stored(kind: str, count: int) -> None:
    suffix = "" if count == 1 else f".{count}"
    code = [f"STSM.16.{kind}{suffix} [R1+0x400], R4", f"LDSM.16.{kind}{suffix} R8, [R1+0x400]"]
    one = runner([*code, "EXIT"], shared=512)
    # Rows lie apart, so that a row at another lane's address shows.
    one.grid.registers[1] = 16 * (LANES ^ 1)
    for k in range(count):
        one.grid.registers[4 + k] = 0x10001 * (100 * k + LANES) + 0x8000
    one.run()
    for k in range(count):
        assert (one.grid.registers[8 + k] == one.grid.registers[4 + k]).all()
    stored = one.memory.shared[0].view(np.uint16).reshape(-1, 8)[[1, 0]]
    pair = one.grid.registers[4].view(np.uint16).reshape(8, 8)
    assert (stored[:2] == (pair if kind == "M88" else pair.T)[:2]).all()


def test_accesses_are_noted_where_each_warp_made_them() -> None:
    code = [
        *("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "@P0 BRA @both@"),
        *("MOV R3, R0", "MOV R3, R0", "both:", "LDS R2, [R1+0x400]"),
    ]
    one = runner([*code, "EXIT"], threads=64, shared=64, traced=True)
    one.run()
    assert one.trace is not None
    first, second = one.trace.of_warps()
    assert first["amount"].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert second["amount"].tolist() == [0, 0, 0, 1, 0]


def test_the_trace_has_what_each_warp_did_and_moved() -> None:
    source = np.zeros(256, np.uint32)
    code = [
        *("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "@P0 EXIT"),
        *("LDG.E R6, desc[UR4][R2.64]", "STS [R1+0x400], R6", "EXIT"),
    ]
    one = runner(code, [source], threads=64, shared=4096, traced=True)
    lanes = np.arange(64, dtype=np.uint64)
    address = source.ctypes.data + 8 * (lanes % 32)
    one.grid.registers[1] = 8 * (lanes % 32)
    one.grid.registers[2], one.grid.registers[3] = address & 0xFFFFFFFF, address >> 32
    one.run()
    assert one.trace is not None
    first, second = one.trace.of_warps()
    assert first["place"].tolist() == [0, 1, 2, 3, 4, 5] and second["place"].tolist() == [0, 1, 2]
    load, store = first[3], first[4]
    lines = len({int(a) // 32 for a in address[:32]})
    assert (load["sectors"], load["amount"], load["address"]) == (lines, 128, source.ctypes.data)
    assert (store["sectors"], store["amount"]) == (0, 2)  # every other bank, twice
