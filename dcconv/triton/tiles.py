"""Tiles of the implicit GEMM: which there are, which are worth a try, which to take untried."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcconv.passes.records import OWN_RULE
from dcconv.tracing import asked_once
from dcconv.triton.launch import blocks, power_of_two_at_least


class GemmTile(NamedTuple):
    """Positions, lanes and depth of a tile of a matrix product, and how it is computed.

    Attributes:
        positions, lanes: rows and columns of a tile of the result.
        depth: elements of the sums that a step of the loop takes.
        warps: that share the tile.
        stages: steps whose operands are in shared memory at a time.
    """

    positions: int
    lanes: int
    depth: int
    warps: int
    stages: int


# From most products per byte loaded to least. tl.dot takes 16 and more of each. A thread has 64
# sums at most, which leaves room for the epilogue.
TILES = (
    GemmTile(128, 128, 64, 8, 3),
    GemmTile(128, 128, 32, 8, 4),
    GemmTile(128, 64, 64, 4, 3),
    GemmTile(128, 64, 32, 4, 4),
    GemmTile(64, 64, 64, 4, 4),
    GemmTile(64, 64, 32, 4, 4),
    GemmTile(128, 32, 32, 4, 4),
    GemmTile(64, 32, 32, 4, 4),
    GemmTile(128, 16, 32, 4, 4),
    GemmTile(64, 16, 32, 4, 4),
    GemmTile(32, 32, 16, 4, 2),
    GemmTile(32, 16, 16, 4, 2),
)

# Sums of fewer elements are padded to this. Taps of fewer channels share steps of the loop.
SHALLOW = 32

# The tuner tries no more: each takes a second or more to compile.
MOST_TRIED = 8

# Inductor's Triton convolutions were miscompiled with eight warps where windows have several
# pixels, and have four since (pytorch #173068, #183989).
WINDOW_WARPS = 4


class Gpu(NamedTuple):
    """What tiles depend on: multiprocessors, bytes of shared memory per program, most stages."""

    processors: int
    shared: int
    stages: int


# On no GPU tensors: kernels are interpreted, or launched on nothing.
NO_GPU = Gpu(2, 96 * 1024, 4)


def gpu_of(x: Tensor) -> Gpu:
    """Return what there is to know of a tensor's GPU."""
    return _gpu(x.device.index) if x.device.type == "cuda" else NO_GPU


@asked_once
def _gpu(index: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        shared, stages = properties.shared_memory_per_block_optin, 4
    else:
        # Without asynchronous copies one step is fetched ahead, into registers.
        shared, stages = properties.shared_memory_per_block, 2
    return Gpu(properties.multi_processor_count, shared, stages)


class Product(NamedTuple):
    """A matrix product [positions, depth] x [depth, lanes], once per group.

    Attributes:
        positions: int, or a symbol where tracing keeps it open.
        planes: that positions are spread over, and tiles do not span.
        groups, lanes: sizes.
        depth: elements that steps of the loop divide: channels, times taps where they share steps.
        taps: pixels of a window.
        shares_steps: whether taps do.
        element_size: of the operands, in bytes.
        in_planes: whether operands lie channel by channel, in contiguous order.
    """

    positions: Any
    planes: Any
    groups: int
    lanes: int
    depth: int
    taps: int
    shares_steps: bool
    element_size: int
    in_planes: bool = False


def programs(tile: GemmTile, product: Product) -> Any:
    """Return how many programs a product takes."""
    columns = product.groups * blocks(product.lanes, tile.lanes)
    rows = blocks(product.positions // product.planes, tile.positions) * product.planes
    return rows * columns


def _fits(tile: GemmTile, product: Product, gpu: Gpu) -> bool:
    stages = min(tile.stages, gpu.stages)
    operands = (tile.positions + tile.lanes) * tile.depth * product.element_size
    # The result passes through shared memory on its way to wide stores.
    result = tile.positions * tile.lanes * 4
    return max(stages * operands, result) <= gpu.shared


def _stays_in_registers(tile: GemmTile, product: Product) -> bool:
    """Whether a tile was compiled without a stack (``tests/triton/test_triton.py``)."""
    wide = product.element_size == 4
    if wide and (tile.positions * tile.lanes > 4096 or tile.depth > 32):
        return False
    # 64 sums a thread beside deep steps through planes: 8 bytes too many on sm_80 with Triton 3.6
    # and 3.7. The same tile with shallow steps loads as much per product.
    sums = tile.positions * tile.lanes // (32 * tile.warps)
    if product.in_planes and sums >= 64 and tile.warps == 4 and tile.depth > 32:
        return False
    # Where taps share steps every element of a step has an address of its own.
    addresses = tile.positions * tile.depth // (32 * tile.warps)
    return not product.shares_steps or addresses <= (8 if wide else 16)


def shares_steps(taps: int, channels: int, channels_last: bool) -> bool:
    """Whether the taps of a window share steps of the loop.

    In contiguous order the taps of a channel are neighbours in the weight.
    """
    return taps > 1 and (channels < SHALLOW or not channels_last)


def product_of(
    images: Any,
    pixels: Any,
    groups: int,
    lanes: int,
    channels: int,
    weight: Tensor,
    channels_last: bool,
) -> Product:
    """Return the product of a weight's windows, of ``channels``, at pixels of images."""
    taps, element_size = weight.shape[2] * weight.shape[3], weight.element_size()
    shared = shares_steps(taps, channels, channels_last)
    planes, depth = 1 if channels_last else images, channels * taps if shared else channels
    loop = (groups, lanes, depth, taps, shared)
    return Product(images * pixels, planes, *loop, element_size, not channels_last)


def worthwhile(product: Product, gpu: Gpu) -> tuple[int, ...]:
    """Return the numbers of the tiles to try, at least one, the one for the largest work first.

    Tiles that do not fit shared memory or registers, or are wider or deeper than the product, are
    left out.
    """
    lanes = max(power_of_two_at_least(product.lanes), min(tile.lanes for tile in TILES))
    depth = max(power_of_two_at_least(product.depth), SHALLOW)
    found = tuple(
        i
        for i, tile in enumerate(TILES)
        if tile.lanes <= lanes
        and 2 * tile.lanes >= min(lanes, 64)
        and tile.depth <= depth
        and (product.taps == 1 or tile.warps <= WINDOW_WARPS)
        and _fits(tile, product, gpu)
        and _stays_in_registers(tile, product)
    )
    return found[:MOST_TRIED] or (len(TILES) - 1,)


def own_rule(product: Product, gpu: Gpu) -> int:
    """Return the number of the tile to take untried: the largest that gives every processor one."""
    tried = worthwhile(product, gpu)
    if not isinstance(product.positions, int):
        return tried[0]
    filling = (i for i in tried if programs(TILES[i], product) >= gpu.processors)
    return next(filling, tried[-1])


def tile_of(number: int, product: Product, gpu: Gpu) -> GemmTile:
    """Return a tile by its number, or by rule for ``OWN_RULE``."""
    tile = TILES[own_rule(product, gpu) if number == OWN_RULE else number]
    return tile._replace(stages=min(tile.stages, gpu.stages))
