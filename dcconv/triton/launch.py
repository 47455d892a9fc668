"""How ops meet kernels: registration, the device of a launch, and the shape of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, triton_op

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
        positions: of a tile.
        in_group, by_group: lanes of a tile are ``in_group`` channels of ``by_group`` groups.
        exact: whether a group has exactly ``in_group`` channels.
        chunks: number of tiles that share a group.
        group_chunks: number of tiles for all groups, where each takes whole groups.
        tiles: number of tiles for all positions.
    """

    positions: int
    in_group: int
    by_group: int
    exact: bool
    chunks: int
    group_chunks: int
    tiles: Any

    @property
    def all_chunks(self) -> int:
        """Number of tiles for all channels."""
        return self.chunks * self.group_chunks


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
    return Tiling(
        positions,
        in_group,
        by_group,
        in_group == per_group,
        blocks(per_group, in_group),
        blocks(groups, by_group),
        tiles,
    )


def gradient_tiling(
    images: Any, pixels: Any, channels: int, groups: int, last: bool, element_size: int
) -> Tiling:
    """Return the cover of a tensor for a depthwise gradient."""
    elements = GRADIENT_BYTES // element_size if last else GRADIENT_ELEMENTS
    return tiling(images, pixels, channels, groups, last, elements)


def filter_tile(size: int) -> tuple[int, int]:
    """Return how many filters of a size, and how many of their elements, a program takes."""
    block = min(power_of_two_at_least(size), FILTER_ELEMENTS)
    return FILTER_ELEMENTS // block, block


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def op(
    name: str, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an op of ``NAMESPACE``.

    ``torch.compile`` looks into it and sees the kernels; interpreted ones are no kernels to it.
    """
    define: Any = custom_op if INTERPRETED else triton_op

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        defined = define(f"{NAMESPACE}::{name}", function, mutates_args=mutates)
        defined.register_fake(fake)
        return function

    return register
