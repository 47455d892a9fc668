"""The library's machine code against the emulated sources, and predictions made from it.

A few launches; `make machine-check` runs all kernels on all architectures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.machine.agree import Comparison, compare_passes, difference
from bench.machine.capture import Emulator, arrays_in, emulator_file
from bench.machine.disassemble import Instruction, Kernel, find_tool
from bench.machine.execute.run import Runner
from bench.machine.gpus import GPUS
from bench.machine.layers import OPERATORS, Layer
from bench.machine.library import Library, built
from bench.machine.predict import predict
from dcconv import native

ARCH = "sm_90a"


@pytest.fixture(scope="module")
def library() -> Library:
    reason = native.cuda_missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        find_tool("cuobjdump")
    except ValueError as missing:
        pytest.skip(str(missing))
    return Library(built())


@pytest.fixture(scope="module")
def emulator(library: Library) -> Emulator:
    reason = emulator_file("builds").why_not(emulator_file("builds").FAST)
    if reason is not None:
        pytest.skip(reason)
    return Emulator(every=False)


@pytest.fixture
def sums(emulator: Emulator) -> dict[str, Any]:
    """Operands of a small launch."""
    x = np.random.default_rng(0).standard_normal(64 * 20).astype(np.float32)
    sums = np.full(20, np.nan, np.float32)
    return {"n": 1, "pixels": 20, "c": 64, "groups": 1, "channels_last": True, "x": x, "sums": sums}


def test_passes_give_what_their_sources_give(emulator: Emulator, library: Library) -> None:
    comparison = Comparison(emulator, library, ARCH)
    compare_passes(comparison, emulator_file("drive"), small=True, show=lambda case: None)
    found = comparison.findings
    assert [f for f in found if not f.agrees] == []
    names = {f.kernel.partition("<")[0] for f in found}
    expected = "pixel_sumsq window_norm filter_norm epilogue grad_dot column_sums filter_grad"
    assert {*expected.split(), "grad_input", "affine_relu"} <= {
        name.removesuffix("_channels_last").removesuffix("_contiguous") for name in names
    }


class Changed(Library):
    """A library in whose kernels one instruction is another."""

    def __init__(self, library: Library, old: str, new: str) -> None:
        self.__dict__ |= library.__dict__
        self.old, self.new = old, new

    def kernel(self, symbol: str, arch: str) -> Kernel:
        found = super().kernel(symbol, arch)

        def change(code: tuple[Instruction, ...]) -> Iterator[Instruction]:
            left = 1
            for one in code:
                if left and one.name == self.old:
                    left = 0
                    one = dataclasses.replace(one, name=self.new)
                yield one

        return dataclasses.replace(found, code=tuple(change(found.code)))


def test_a_changed_instruction_is_found(
    emulator: Emulator, library: Library, sums: dict[str, Any]
) -> None:
    (good,) = Comparison(emulator, library, ARCH).compare("pixel_sumsq", "float32", sums)
    assert good.agrees and good.kernel == "pixel_sumsq_channels_last<float, 4, 1>"
    expected = (sums["x"].reshape(20, 64).astype(np.float64) ** 2).sum(1)
    assert sums["sums"] == pytest.approx(expected, rel=1e-5)
    changed = Changed(library, "FADD", "FMUL")
    (bad,) = Comparison(emulator, changed, ARCH).compare("pixel_sumsq", "float32", sums)
    assert not bad.agrees


def test_a_tensor_that_the_launch_was_not_given_stops_it(
    emulator: Emulator, library: Library, sums: dict[str, Any]
) -> None:
    (launch,) = emulator.launches("pixel_sumsq", "float32", sums, run=False)
    assert np.isnan(sums["sums"]).all()
    kernel = library.kernel(launch.symbol, ARCH)
    for name, what in (("x", "load"), ("sums", "store")):
        arrays = [a for a in arrays_in(sums) if a is not sums[name]]
        sentence = (
            rf"kernel pixel_sumsq.* must {what} .*, got address 0x[0-9a-f]+ in block \(0, 0\)"
        )
        with pytest.raises(ValueError, match=sentence):
            Runner(kernel, launch, arrays).run()


def test_what_is_no_number_in_one_of_both_is_a_difference() -> None:
    one, other = np.array([1.0, np.nan], np.float32), np.array([1.0, 2.0], np.float32)
    assert difference(one, other, "float32") == np.inf
    assert difference(other, one, "float32") == np.inf
    assert difference(one, one, "float32") == 0
    half = np.array([0x3F80, 0x3F81], np.uint16)
    assert difference(half, half[::-1], "bfloat16") == pytest.approx(128 / 129)


def test_a_pass_is_predicted(emulator: Emulator, library: Library) -> None:
    layer = Layer(1, 64, 28, 64, 3)
    made = {
        dtype: predict(
            *(emulator, library, GPUS["H200"], dtype, True, OPERATORS["default"], "pixel_sumsq"),
            *(layer, (2, 4), (700, 1400)),
        )
        for dtype in ("float32", "bfloat16")
    }
    for dtype, found in made.items():
        assert found.kernel.startswith("pixel_sumsq_channels_last<")
        # A vector is loaded and nothing but a sum of 64 channels is stored.
        assert found.slots == pytest.approx(GPUS["H200"].slots(512))
        assert 20 < found.instructions < 200, dtype
        # Bound by DRAM at either latency, on a grid of what fits.
        assert all(0.95 < found.bandwidth[latency] < 1.02 for latency in (700, 1400))
        assert 1 <= found.launched <= found.resident
        assert found.needed == pytest.approx(GPUS["H200"].bytes_per_cycle * 700)
    assert made["float32"].row()["over_slots"] == made["float32"].over_slots
