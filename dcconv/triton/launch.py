"""How ops meet kernels: registration, the device of a launch, and the shape of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from dcconv.operator.layout import on_device
from dcconv.passes.op import Op, Record, Result
from dcconv.triton.environment import INTERPRETED
from dcconv.triton.fused import NAMESPACE

# Widest tiles: 256 channels, of channels_last tensors; 64 positions, of planes of contiguous ones.
# Those are the neighbours in memory.
LANES, POSITIONS = 256, 64

# Elements of a tile: 16 per thread of four warps of 32, two 16-byte vectors of half precision.
ELEMENTS = 2048

# Tiles of depthwise gradients. In channels_last order a thread of four warps has a vector of 16
# bytes; in contiguous order each element has an address of its own, and a thread registers for
# four.
GRADIENT_BYTES, GRADIENT_ELEMENTS = 2048, 512

# Elements a program takes at a time of what has one dimension, and of filters.
BLOCK = 256
FILTER_ELEMENTS = 1024


def power_of_two_at_least(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def blocks(n: Any, size: int) -> Any:
    """Return ceil(n / size), also of a symbolic n."""
    return (n + size - 1) // size


class Tiling(NamedTuple):
    """A cover of positions times channels by tiles.

    Attributes:
        images, pixels, groups, per_group: what is covered: channels of a group.
        last: whether channels are the neighbours in memory.
        positions: of a tile.
        in_group, by_group: lanes of a tile are ``in_group`` channels of ``by_group`` groups.
        chunks: number of tiles that share a group.
        group_chunks: number of tiles for all groups, where each takes whole groups.
        tiles: number of tiles for all positions.
    """

    images: Any
    pixels: Any
    groups: int
    per_group: int
    last: bool
    positions: int
    in_group: int
    by_group: int
    chunks: int
    group_chunks: int
    tiles: Any

    @property
    def all_chunks(self) -> int:
        """Number of tiles for all channels."""
        return self.chunks * self.group_chunks

    @property
    def programs(self) -> Any:
        """One per tile."""
        return self.tiles * self.all_chunks

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Arguments ``images`` to ``all_chunks`` of a kernel."""
        return (*self[:4], self.chunks, self.all_chunks)

    @property
    def map_constants(self) -> dict[str, Any]:
        """Constants of a kernel whose lanes are groups."""
        return {"LAST": self.last, "P": self.positions, "BY_GROUP": self.by_group}

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a kernel; EXACT: a group has exactly IN_GROUP channels."""
        exact = self.in_group == self.per_group
        return {**self.map_constants, "IN_GROUP": self.in_group, "EXACT": exact}


def tiling(
    images: Any, pixels: Any, channels: int, groups: int, last: bool, elements: int = ELEMENTS
) -> Tiling:
    """Return the cover of a tensor [images, channels, pixels] or of a map (channels = groups)."""
    longest = elements if last else min(POSITIONS, power_of_two_at_least(int(pixels)))
    widest = LANES if last else min(LANES, elements // longest)
    per_group = channels // groups
    in_group = min(power_of_two_at_least(per_group), widest)
    by_group = min(power_of_two_at_least(groups), widest // in_group)
    positions = min(longest, elements // (in_group * by_group))
    tiles = blocks(images * pixels, positions) if last else images * blocks(pixels, positions)
    tile = (positions, in_group, by_group)
    chunks = (blocks(per_group, in_group), blocks(groups, by_group))
    return Tiling(images, pixels, groups, per_group, last, *tile, *chunks, tiles)


def gradient_elements(last: bool, element_size: int) -> int:
    """Return the size of tiles of a depthwise gradient."""
    return GRADIENT_BYTES // element_size if last else GRADIENT_ELEMENTS


def sums_elements(kinds: int, wide: bool) -> int:
    """Return the size of tiles of a pass with sums; ``wide``: of float32 in contiguous order."""
    # Every sum takes a register per element: more of them leave registers for smaller tiles.
    elements = ELEMENTS >> (kinds + 1) // 2
    # A vector of 16 bytes for a thread, half of one beside three sums. With twice that mix x linear
    # and tanh x linear had two values more than registers (Triton 3.8, sm_90).
    return min(elements, GRADIENT_ELEMENTS >> kinds // 3) if wide else elements


class FilterTiling(NamedTuple):
    """A cover of filters, of a size each, by programs; FILTERS and BLOCK of its kernels."""

    filters: int
    size: int
    programs: int
    constants: dict[str, int]


def filter_tiling(weight: Tensor) -> FilterTiling:
    """Return the cover of a weight: whole filters or, of long ones, one after another."""
    filters, size = weight.shape[0], weight.shape[1] * weight.shape[2] * weight.shape[3]
    block = min(power_of_two_at_least(size), FILTER_ELEMENTS)
    together = FILTER_ELEMENTS // block
    constants = {"FILTERS": together, "BLOCK": block}
    return FilterTiling(filters, size, blocks(filters, together), constants)


def launch(kernel: Any, programs: Any) -> Callable[..., None]:
    """Return the function that launches a kernel, on the device of its first argument."""

    def run(*arguments: Any, **constants: Any) -> None:
        with on_device(arguments[0]):
            wrap_triton(kernel)[(programs,)](*arguments, **constants)

    return run


#: Names of the registered ops.
names: list[str] = []


def _triton_op(
    name: str, function: Callable[..., Any], *, mutates_args: Sequence[str], schema: str
) -> None:
    """Define an op whose kernels ``torch.compile`` sees.

    PyTorch 2.13 takes a schema and infers one of the function's own arguments all the same.
    """
    library: Any = torch._library.triton
    inferred = library.infer_schema
    library.infer_schema = lambda *unused, **options: schema
    try:
        triton_op(name, function, mutates_args=mutates_args, schema=schema)
    finally:
        library.infer_schema = inferred


def op(
    op: Op[Record, Result],
) -> Callable[[Callable[[Record], Result]], Callable[[Record], Result]]:
    """Register a function of an op's record as that op of ``NAMESPACE``.

    ``torch.compile`` looks into it and sees the kernels; interpreted ones are no kernels to it.
    """
    define: Any = custom_op if INTERPRETED else _triton_op

    def register(function: Callable[[Record], Result]) -> Callable[[Record], Result]:
        mutates = (op.writes,) if op.writes else ()
        full_name, run = f"{NAMESPACE}::{op.name}", op.taking(function)
        define(full_name, run, mutates_args=mutates, schema=op.schema)
        op.register(NAMESPACE)
        names.append(op.name)
        return function

    return register
