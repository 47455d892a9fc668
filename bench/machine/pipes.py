"""Which pipe of a multiprocessor's sub-partition an instruction takes, and for how long.

Cycles are those that one warp's instruction keeps its pipe busy: 32 lanes over the lanes of the
pipe. Sources: "Throughput of Native Arithmetic Instructions" in the CUDA C++ Programming Guide
gives results per cycle and multiprocessor, a quarter of which a sub-partition has; that FP32 has
two halves from sm_86 on, of which one also takes integer products, is the word of NVIDIA's staff
(forums.developer.nvidia.com/t/302018), as are four sub-partitions with a scheduler each
(/t/315200). ptxas's stall counts agree: two cycles between FFMA on sm_80 and one on later ones, two
between instructions of the ALU on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.machine.disassemble import Instruction
from dcconv.operator.checks import choice

#: FMA: float32 sums and products. HEAVY: integer products, on a half of FMA. ALU: logic, compares,
#: shifts, moves. HALF: packed float16. XU: the special functions and conversions. LSU: memory and
#: shuffles, one unit for the multiprocessor. The rest by their names.
PIPES = (
    *("FMA", "HEAVY", "ALU", "HALF", "XU", "LSU"),
    *("BRANCH", "UNIFORM", "TENSOR", "FP64", "OTHER"),
)

_BY_PIPE = {
    "FMA": "FADD FMUL FFMA",
    "HEAVY": "IMAD IDP",
    "HALF": "HADD2 HFMA2 HMUL2 HMNMX2 HSETP2",
    "ALU": (
        "LOP3 IADD3 SHF LEA PRMT SEL FSEL ISETP FSETP FMNMX IMNMX VIMNMX VIADDMNMX IABS MOV PLOP3 "
        "P2R R2P VIADD VABSDIFF BMSK SGXT CS2R LOP VOTE R2UR I2FP F2FP"
    ),
    "XU": "MUFU F2I F2F FRND I2F POPC FLO BREV FCHK",
    "LSU": (
        "LDG STG LD ST LDS STS LDSM STSM LDGSTS LDL STL ATOMG ATOMS RED SHFL MOVM LDC S2R BAR "
        "LDGDEPBAR MEMBAR S2UR REDUX"
    ),
    "BRANCH": "BRA BRX BRXU JMP CALL RET EXIT BSSY BSYNC WARPSYNC BREAK YIELD ENDCOLLECTIVE",
    "TENSOR": "HMMA IMMA HGMMA DMMA QMMA",
    "FP64": "DADD DMUL DFMA DSETP",
}
_PIPE_OF = {name: pipe for pipe, names in _BY_PIPE.items() for name in names.split()}


def pipe_of(instruction: Instruction) -> str:
    """Return the pipe of an instruction."""
    other = "UNIFORM" if instruction.name.startswith("U") else "OTHER"
    return _PIPE_OF.get(instruction.name, other)


@dataclass(frozen=True)
class Costs:
    """Cycles of an architecture's pipes for one warp's instruction.

    Attributes:
        cycles: by pipe.
        halves: whether FMA has two halves of 16 lanes: HEAVY takes one of them, HALF both.
    """

    cycles: Mapping[str, float]
    halves: bool

    def busy(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the busy cycles by pipe, and of the scheduler as ISSUE."""
        n = {pipe: counts.get(pipe, 0.0) for pipe in PIPES}
        found = {p: c * n[p] for p, c in self.cycles.items() if p not in ("FMA", "HEAVY", "HALF")}
        if self.halves:
            heavy, any_half, both = 2 * n["HEAVY"], 2 * n["FMA"], 2 * n["HALF"]
            found["FMA"] = max((heavy + any_half + both) / 2, heavy + both / 2)
        else:
            found["FMA"] = 2 * (n["FMA"] + n["HEAVY"])
            found["HALF"] = n["HALF"]
        return {"ISSUE": float(sum(n.values())), **found}


# What all have in common; LSU is the port of a sub-partition, its unit is simulated.
_COMMON = {
    **{"FMA": 1.0, "HEAVY": 2.0, "ALU": 2.0, "HALF": 1.0, "XU": 8.0, "LSU": 2.0},
    **{"BRANCH": 2.0, "UNIFORM": 2.0, "OTHER": 1.0},
}

#: TENSOR is the GPU's: bench.machine.gpus.
COSTS = {
    "sm_80": Costs({**_COMMON, "FMA": 2.0, "FP64": 2.0}, halves=False),
    "sm_86": Costs({**_COMMON, "FP64": 64.0}, halves=True),
    "sm_89": Costs({**_COMMON, "FP64": 64.0}, halves=True),
    "sm_90a": Costs({**_COMMON, "FP64": 2.0}, halves=True),
}


def costs_of(arch: str) -> Costs:
    """Return the costs of an architecture."""
    choice("arch", arch, COSTS)
    return COSTS[arch]


def count(instructions: Iterable[Instruction]) -> dict[str, float]:
    """Return how many instructions each pipe takes."""
    found = dict.fromkeys(PIPES, 0.0)
    for instruction in instructions:
        found[pipe_of(instruction)] += 1
    return {pipe: number for pipe, number in found.items() if number}
