"""Endless, resumable sources of training batches, and batches for evaluation.

``TensorStream`` serves data that fits on the device; ``train.data.images`` and
``train.data.shards`` serve files. Which images make a batch is a function of the seed and of the
position alone, so a stream resumes by its position, and N ranks see what one rank would see with
a batch N times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dcconv.operator import checks

# First numbers of derived seeds, so that no two purposes share a sequence.
ORDER, AUGMENT = 1, 2


class Stream(Protocol):
    """Training batches on the device, without end.

    ``images_per_epoch`` counts the images of all ranks.
    """

    images_per_epoch: int

    def next(self) -> tuple[Tensor, Tensor]:
        """Return augmented images [n, c, h, w] and labels [n] int64, both on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs for the same batches to follow, bit for bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was that gave the state."""


class Augmentation(Protocol):
    """A random change of images whose random part can be drawn ahead, for many images at once."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the random numbers of n images, [n, k] int64 on the generator's device."""

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images [n, c, h, w] changed as the draws [n, k] say, as float32."""

    def normalise(self, images: Tensor) -> Tensor:
        """Return the images for evaluation, without any random change, as float32."""


def derive_seed(*numbers: int) -> int:
    """Mix non-negative integers into one seed below 2**63."""
    word = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(word) >> 1


@dataclass(frozen=True)
class Cursor:
    """How far a stream is: images of all ranks that were taken from an epoch."""

    epoch: int = 0
    position: int = 0


def take(
    cursor: Cursor, count: int, images: int, wrap: bool
) -> tuple[list[tuple[int, int, int]], Cursor]:
    """Return where the next ``count`` images lie, as (epoch, start, stop), and the next cursor.

    With ``wrap`` a batch may end one epoch and begin the next, and no image is left out. Without
    it the rest of an epoch that fills no batch is dropped.
    """
    epoch, position = cursor.epoch, cursor.position
    if not wrap and position + count > images:
        epoch, position = epoch + 1, 0
    spans = []
    while count:
        stop = min(position + count, images)
        spans.append((epoch, position, stop))
        count -= stop - position
        position = stop
        if position == images:
            epoch, position = epoch + 1, 0
    return spans, Cursor(epoch, position)


def check_share(batch_size: int, rank: int, world_size: int) -> None:
    """Check the arguments that decide a rank's share."""
    checks.integer("batch_size", batch_size, 1)
    checks.integer("world_size", world_size, 1)
    checks.integer("rank", rank, 0)
    if rank >= world_size:
        raise checks.value_error("rank", f"be below world_size = {world_size}", rank)


def check_batch(batch_size: int, world_size: int, images: int, wrap: bool) -> None:
    """Require a batch that an epoch can fill, where the rest of an epoch is dropped."""
    if not wrap and batch_size * world_size > images:
        rule = f"be at most the number of training images per rank, {images // world_size}"
        raise checks.value_error("batch_size", rule, batch_size)


def check_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Require a saved stream's state to be of the same data and order."""
    for name, value in expected.items():
        if state.get(name) != value:
            rule = f"be {value!r} to resume this stream"
            raise checks.value_error(f"saved stream's {name}", rule, repr(state.get(name)))


def read_cursor(state: dict[str, Any], images: int) -> Cursor:
    """Return the cursor of a saved state, checked."""
    for name in ("epoch", "position"):
        checks.integer(f"saved stream's {name}", state.get(name), 0)
    if state["position"] >= images:
        rule = f"be below the number of images, {images}"
        raise checks.value_error("saved stream's position", rule, state["position"])
    return Cursor(state["epoch"], state["position"])


class TensorStream:
    """Batches of images that lie on the device as a whole.

    The order and the random numbers of an epoch are drawn at once on the CPU, from the seed and
    the epoch, and moved to the device once: every device trains on the same images, and a batch
    costs a gather without waiting for the device.

    Args:
        images: [n, c, h, w], of any dtype that the augmentation takes.
        labels: [n].
        batch_size: images of one rank per batch.
        seed: decides the order and the augmentation.
        augment: what happens to training images.
        device: where images are kept and batches appear.
        rank: which share of every batch this process takes.
        world_size: number of shares.
        wrap: let batches run from one epoch into the next, as the official training does; else
            drop the rest of an epoch that fills no batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: Augmentation,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        wrap: bool = True,
    ) -> None:
        check_share(batch_size, rank, world_size)
        checks.integer("seed", seed, 0)
        self.images_per_epoch = len(images)
        if len(images) == 0 or len(labels) != len(images):
            rule = f"have one entry for each of at least one image, {len(images)}"
            raise checks.value_error("labels", rule, len(labels))
        check_batch(batch_size, world_size, len(images), wrap)
        self.images = images.to(device)
        self.labels = labels.to(device=device, dtype=torch.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.rank = rank
        self.world_size = world_size
        self.wrap = wrap
        self.cursor = Cursor()
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return an epoch's order [n] and its random numbers [n, k], on the device."""
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derive_seed(ORDER, self.seed, epoch))
            order = torch.randperm(self.images_per_epoch, generator=generator)
            draws = self.augment.draw(self.images_per_epoch, generator)
            device = self.images.device
            self._epochs = {
                key: value for key, value in self._epochs.items() if key == epoch - 1
            } | {epoch: (order.to(device), draws.to(device))}
        return self._epochs[epoch]

    def next(self) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the next batch."""
        spans, self.cursor = take(
            self.cursor, self.batch_size * self.world_size, self.images_per_epoch, self.wrap
        )
        orders, draws = [], []
        for epoch, start, stop in spans:
            order, draw = self._epoch(epoch)
            orders.append(order[start:stop])
            draws.append(draw[start:stop])
        share = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        rows = torch.cat(orders)[share]
        images = self.augment.apply(self.images[rows], torch.cat(draws)[share])
        return images, self.labels[rows]

    def _identity(self) -> dict[str, Any]:
        return {"kind": "tensor", "images": self.images_per_epoch, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Return the position; it holds for any number of ranks."""
        return self._identity() | {
            "epoch": self.cursor.epoch,
            "position": self.cursor.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state is of other data or of another seed.
        """
        check_state(state, self._identity())
        self.cursor = read_cursor(state, self.images_per_epoch)


class TensorBatches:
    """Every image once, in order, for evaluation: an iterable of (images, labels) batches.

    A rank takes every ``world_size``-th image. The last batch is smaller where the images do not
    fill it, and ranks may have different numbers of images and of batches: sum what is right and
    what there is over the batches first, then over the ranks.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        augment: Augmentation,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, rank, world_size)
        if len(labels) != len(images):
            rule = f"have one entry for each image, {len(images)}"
            raise checks.value_error("labels", rule, len(labels))
        self.images = images[rank::world_size].to(device)
        self.labels = labels[rank::world_size].to(device=device, dtype=torch.int64)
        self.batch_size = batch_size
        self.augment = augment

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.augment.normalise(self.images[part]), self.labels[part]
