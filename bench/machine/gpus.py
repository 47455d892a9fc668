"""What three GPUs can do: the figures that predictions rest on, each with its source.

Figures without a source are assumptions, and ``ASSUMED`` lists them; predictions are also made
with other latencies of DRAM.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcconv.operator.checks import choice


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its vendor writes it.
        arch: whose machine code it runs.
        sms: multiprocessors.
        clock: cycles a second.
        dram: bytes a second that copies reach, reads and writes together.
        l2: bytes a second out of L2.
        tensor_cycles: of a sub-partition's tensor core for one m16n8k16 with float32 sums.
        matrix_rate: FLOP/s of the library's own matrix products.
        shared: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor holds at most.
        latency: cycles from issue to result: L1, L2, DRAM under load, shared memory.
    """

    name: str
    arch: str
    sms: int
    clock: float
    dram: float
    l2: float
    tensor_cycles: float
    matrix_rate: float
    shared: int
    warps: int
    latency: tuple[int, int, int, int]
    registers: int = 65536

    @property
    def bytes_per_cycle(self) -> float:
        """DRAM's bytes for one multiprocessor."""
        return self.dram / self.sms / self.clock

    @property
    def l2_bytes_per_cycle(self) -> float:
        """L2's bytes for one multiprocessor, whose port takes 64."""
        return min(self.l2 / self.sms / self.clock, 64.0)

    def slots(self, moved: float) -> float:
        """Return the issue slots of four schedulers while DRAM moves so many bytes."""
        return 4 * moved / self.bytes_per_cycle

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Return how many blocks of a kernel a multiprocessor holds.

        Registers are handed out to warps 256 at a time; the system takes 1 KiB of shared memory of
        every block. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
        """
        warps = threads // 32
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        by_shared = (self.shared + 1024) // (shared + 1024)
        return max(1, min(by_registers, self.warps // warps, by_shared, 32))


#: Cycles of loaded DRAM that every prediction is made with, and those of the committed tables.
DRAM_LATENCIES = (700, 1000, 1400)
DRAM_LATENCY = 1000

ASSUMED = {
    "loaded DRAM latency": "1,000 cycles; 700 and 1,400 are shown beside it",
    "latency and rate of L2": "220 to 270 cycles; 30 bytes a cycle and multiprocessor on H200",
    "a taken branch": "4 cycles more than its stall count",
    "DRAM that copies reach": "90 % (H200, A100) and 92 % (RTX 4090) of the data sheet's rate",
    "clock": "the boost clock of the data sheet, held",
}

#: Multiprocessors, clocks, DRAM and shared memory: NVIDIA's data sheets and architecture papers
#: (H100 and H200: "NVIDIA H100 Tensor Core GPU Architecture"; A100: "NVIDIA A100 Tensor Core GPU
#: Architecture"; RTX 4090: "NVIDIA Ada GPU Architecture"). Tensor cores: 4096 FLOP a cycle and
#: multiprocessor of H100 and H200 in bfloat16, 2048 of A100 (NVIDIA/cudnn-frontend, issues 650 and
#: 715); mma.sync reaches 4 / 6.4 of that on Hopper, by ptxas's own spacing of HMMA.16816 and by
#: "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024.
#: Products of cuBLAS on H200: 760 to 786 TFLOP/s (NVIDIA/tilus, issue 86).
GPUS = {
    "H200": Gpu(
        *("H200", "sm_90a", 132, 1.755e9, 4.3e12, 7.0e12, 6.4, 790e12, 227 << 10, 64),
        latency=(40, 270, DRAM_LATENCY, 30),
    ),
    "H100": Gpu(
        *("H100 SXM", "sm_90a", 132, 1.755e9, 3.0e12, 7.0e12, 6.4, 750e12, 227 << 10, 64),
        latency=(40, 270, DRAM_LATENCY, 30),
    ),
    "A100": Gpu(
        *("A100 80GB", "sm_80", 108, 1.41e9, 1.77e12, 4.0e12, 8.0, 270e12, 163 << 10, 64),
        latency=(36, 220, DRAM_LATENCY, 29),
    ),
    "RTX4090": Gpu(
        *("RTX 4090", "sm_89", 128, 2.52e9, 0.93e12, 4.5e12, 32.0, 160e12, 99 << 10, 48),
        latency=(34, 270, DRAM_LATENCY, 29),
    ),
}


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its short name."""
    choice("gpu", name, GPUS)
    return GPUS[name]
