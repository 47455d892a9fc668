"""Machine code that is read, its loops, and what the command says of bad input."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from listings import code, kernel, listing

from bench.__main__ import main
from bench.machine.disassemble import jump_tables, parse, parse_instruction
from bench.machine.flow import Graph
from bench.machine.gpus import GPUS
from bench.machine.library import Library
from bench.machine.loops import load_distances, traffic, trips
from bench.machine.pipes import COSTS, count, pipe_of

# A stream: the load of a trip is awaited four instructions later, in the same trip.
STREAM = [
    "MOV R0, RZ",
    "top:",
    ("LDG.E.128 R4, desc[UR4][R2.64]", "written=2"),
    "IADD3 R0, R0, 0x1, RZ",
    "ISETP.GE.AND P0, PT, R0, 0x4, PT",
    "IADD3 R2, R2, 0x10, RZ",
    ("FADD R4, R4, R5", "wait=4"),
    "STG.E.128 desc[UR4][R8.64], R4",
    "@!P0 BRA @top@",
    "EXIT",
]


def test_an_instruction_is_read_with_its_control_code() -> None:
    high = (5 | 1 << 4 | 2 << 5 | 3 << 8 | 0b100001 << 11) << 41
    one = parse_instruction(0x40, "@!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10]", high)
    assert (one.guard, one.name, one.modifiers) == ("!P1", "LDG", ("E", "128", "CONSTANT"))
    assert one.operands == ("R4", "desc[UR4][R2.64+0x10]")
    assert (one.stall, one.yields, one.written, one.read, one.waits) == (5, False, 2, 3, 33)
    assert one.bytes == 16


@pytest.mark.parametrize(
    ("text", "target"),
    [("BRA 0x40", 0x40), ("BRA !P5, 0x50", 0x50), ("BSSY B0, 0x60", 0x60), ("MOV R1, 0x70", None)],
)
def test_targets_of_branches(text: str, target: int | None) -> None:
    assert parse_instruction(0, text, 0).target == target


def test_kernels_of_a_listing_are_told_apart() -> None:
    text = listing("one", ["EXIT"]) + listing("other", ["NOP", "EXIT"])
    assert [(name, len(found)) for name, found in parse(text.splitlines())] == [
        ("one", 1),
        ("other", 2),
    ]


def test_what_is_no_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="dcconv: an instruction must be a name"):
        parse_instruction(0, "???", 0)


def test_a_loop_is_found_with_its_traffic_and_its_distance() -> None:
    (trip,) = trips(kernel(STREAM), GPUS["H200"], smallest=1)
    assert (trip.address, trip.shortest, trip.longest) == (0x10, 7, 7)
    assert (trip.loads, trip.stores, trip.distance) == (512, 512, 4)
    assert trip.pipes == {"LSU": 2, "ALU": 3, "FMA": 1, "BRANCH": 1}
    assert (trip.busiest, trip.cycles) == ("ISSUE", 7)
    assert trip.slots == pytest.approx(4 * 1024 / (4.3e12 / 132 / 1.755e9))


def test_a_load_may_be_awaited_in_the_next_trip() -> None:
    found = code(STREAM)
    way = [5, 1, 2, 3, 4]  # the addition waits for the load of the trip before
    assert load_distances(found, way * 3) == {1: [4, 4]}


def test_inner_loops_are_not_counted_in_their_outer_ones() -> None:
    nest = kernel(
        [
            *("MOV R0, RZ", "outer:", "MOV R1, RZ", "inner:", "IADD3 R1, R1, 0x1, RZ"),
            *("ISETP.GE.AND P0, PT, R1, 0x4, PT", "@!P0 BRA @inner@", "IADD3 R0, R0, 0x1, RZ"),
            *("ISETP.GE.AND P1, PT, R0, 0x4, PT", "@!P1 BRA @outer@", "EXIT"),
        ]
    )
    outer, inner = trips(nest, GPUS["A100"], smallest=1)
    assert (outer.loop.depth, inner.loop.depth) == (0, 1)
    assert (outer.longest, inner.longest, outer.loop.own) == (4, 3, [1, 5, 6, 7])


def test_the_longest_way_avoids_the_call_of_a_slow_path() -> None:
    branching = kernel(
        [
            *("top:", "@P0 BRA @slow@", "MUFU.RCP R0, R1", "join:", "FMUL R2, R0, R3"),
            *("@P1 BRA @top@", "EXIT", "slow:", "MOV R4, 0x60", "MOV R5, RZ"),
            *("CALL.REL.NOINC @function@", "BRA @join@", "function:", "RET.REL.NODEC R4 0x0"),
        ]
    )
    (loop,) = Graph(branching).loops
    shortest, longest = Graph(branching).ways(loop)
    assert shortest == longest == [0, 1, 2, 3]


@pytest.mark.parametrize("jump", ["BRX R2", "BRXU UR2"])
def test_a_jump_table_leads_to_its_cases(jump: str) -> None:
    table = struct.pack("<3I", 0x20, 0x30, 0x999)
    given = kernel(["MOV R2, RZ", f"{jump} -0x20", "EXIT", "EXIT"])
    jumping = type(given)(*("k", "k", "sm_90a"), given.code, 32, 0, 0, table)
    assert Graph(jumping).next[0] == [2, 3]


@pytest.mark.parametrize(
    ("text", "pipe"),
    [
        *(("FFMA R0, R1, R2, R3", "FMA"), ("IMAD.MOV.U32 R0, RZ, RZ, R1", "HEAVY")),
        *(("PRMT R0, R1, 0x5410, R2", "ALU"), ("UIADD3 UR4, UR5, 0x1, URZ", "UNIFORM")),
        *(("HMMA.16816.F32 R0, R4, R8, R0", "TENSOR"), ("NOP", "OTHER")),
    ],
)
def test_pipes(text: str, pipe: str) -> None:
    assert pipe_of(parse_instruction(0, text, 0)) == pipe


def test_integer_products_take_one_half_of_the_pipe_that_sums_share() -> None:
    mixed = {"FMA": 6.0, "HEAVY": 2.0}
    assert COSTS["sm_90a"].busy(mixed)["FMA"] == 8
    assert COSTS["sm_90a"].busy({"HEAVY": 4.0})["FMA"] == 8
    assert COSTS["sm_80"].busy(mixed)["FMA"] == 16


def test_instructions_are_counted_and_their_bytes() -> None:
    found = code(["LDG.E R0, desc[UR4][R2.64]", "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]"])
    assert count(found) == {"LSU": 2}
    assert traffic(found) == (32 * 4 + 32 * 16, 0)


def test_blocks_that_a_multiprocessor_holds() -> None:
    h200 = GPUS["H200"]
    assert h200.resident(256, 34, 0) == 6  # 40 registers a thread are handed out
    assert h200.resident(256, 32, 0) == 8
    assert h200.resident(128, 32, 100 << 10) == 2
    assert GPUS["RTX4090"].resident(256, 32, 0) == 6


def test_relocations_fill_jump_tables() -> None:
    names = b"\0.shstrtab\0.nv.constant2.k\0.rela.nv.constant2.k\0"
    table, rela = bytes(8), struct.pack("<QQq", 4, 0, 0x120)
    at = 64
    bodies = [names, table, rela]
    places = [at, at + len(names), at + len(names) + len(table)]
    offset = places[-1] + len(rela)
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, offset)
    struct.pack_into("<HHH", head, 0x3A, 64, 3, 0)
    sections = [
        struct.pack("<IIQQQQ", name, 0, 0, 0, place, len(body)).ljust(64, b"\0")
        for name, place, body in zip((1, 11, 27), places, bodies, strict=True)
    ]
    cubin = bytes(head) + b"".join(bodies) + b"".join(sections)
    assert jump_tables(cubin) == {"k": struct.pack("<II", 0, 0x120)}


# A toolkit that knows one library with one kernel.
DISASSEMBLER = """#!/bin/sh
case "$1" in
  -lelf) echo "ELF file    1: some.1.sm_90a.cubin" ;;
  -xelf) : > some.1.sm_90a.cubin ;;
  --dump-resource-usage) printf ' Function stream:\\n  REG:40 STACK:0 SHARED:1024 LOCAL:0\\n' ;;
  -sass) cat "$0.listing" ;;
esac
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "bin/cuobjdump"
    tool.parent.mkdir()
    tool.write_text(DISASSEMBLER)
    tool.chmod(0o755)
    tool.with_suffix(".listing").write_text(listing("stream", STREAM))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("bench.machine.library._tables", lambda cubin: {})
    path = tmp_path / "some.so"
    path.write_bytes(b"library")
    return path


def test_kernels_of_a_library(library: Path) -> None:
    (found,) = Library(library).find("stre", "sm_90a")
    assert (found.name, found.registers, found.shared) == ("stream", 40, 0)
    assert len(found.code) == 9


def status(library: Path, *words: str) -> int:
    return main(["machine", "loops", "--library", str(library), *words])


def test_the_command_prints_loops(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(library, "--smallest", "1") == 0
    printed = capsys.readouterr().out
    assert "stream (sm_90a, 40 registers, H200)" in printed and "0x10" in printed
    assert status(library, "--code", "10", "--smallest", "1") == 0
    assert "LDG.E.128 R4, desc[UR4][R2.64]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arch", "sm_12"], "dcconv: arch must be one of"),
        (["--arch", "sm_80"], "dcconv: arch must be one of sm_90a, got sm_80"),
        (["--gpu", "V100"], "dcconv: gpu must be one of H200,"),
        (["--kernel", "no"], "dcconv: kernel must be part of the name of one of the 1 kernels"),
        (["--code", "xyz"], "dcconv: code must be a hexadecimal address, got xyz"),
        (["--smallest", "0"], "dcconv: smallest must be"),
    ],
)
def test_bad_input_is_one_sentence(
    library: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(library, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_a_library_without_cuda_code_is_refused(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = library.parent / "bin/cuobjdump"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert status(library) == 2
    assert capsys.readouterr().err.startswith("dcconv: library must have CUDA code, got ")
    assert status(library.with_name("gone.so")) == 2
    assert capsys.readouterr().err.startswith("dcconv: library must be a file, got ")


def test_a_missing_disassembler_is_said(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert status(library) == 2
    sentence = "dcconv: cuobjdump must be in a CUDA toolkit or in Triton's package, got none\n"
    assert capsys.readouterr().err == sentence
