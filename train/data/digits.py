"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor

from train.data.stream import check_state
from train.engine.files import ContentError
from train.engine.rng import check_generator

IMAGES = 1797
CLASSES = 10
IMAGE_SIZE = 8


class Split(NamedTuple):
    """Images [n, 1, 8, 8] from 0 (background) to 1, and their classes [n]."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def load_split(seed: int, test_share: float) -> Split:
    """Return the digits, divided by the seed into classes' equal shares of training and test."""
    pixels, classes = load_digits(return_X_y=True)
    images = (pixels / 16.0).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE).astype("float32")
    parts = train_test_split(
        images, classes, test_size=test_share, stratify=classes, random_state=seed
    )
    train_images, test_images, train_classes, test_classes = map(torch.from_numpy, parts)
    return Split(train_images, train_classes, test_images, test_classes)


def random_shift(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Move every image by its own whole number of pixels per axis, with background moving in."""
    n, _, h, w = images.shape
    padded = F.pad(images, (largest,) * 4)
    top, left = torch.randint(2 * largest + 1, (2, n, 1), generator=generator)
    rows = (top + torch.arange(h)).reshape(n, 1, h, 1)
    columns = (left + torch.arange(w)).reshape(n, 1, 1, w)
    return padded[torch.arange(n).reshape(n, 1, 1, 1), 0, rows, columns]


class DigitsStream:
    """Endless batches of randomly shifted training images, each epoch in a new order.

    The rest of an epoch that fills no batch is left out.

    Args:
        split: whose training images are served.
        batch_size: images of a batch.
        seed: of the order and the shifts.
        shift: the largest shift in pixels.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, shift: int = 1) -> None:
        self.images = split.train_images
        self.classes = split.train_classes
        self.batch_size = batch_size
        self.shift = shift
        self.batches = len(self.images) // batch_size
        self.images_per_epoch = self.batches * batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.taken = self.images_per_epoch

    def next(self) -> tuple[Tensor, Tensor]:
        """Return shifted images [n, 1, 8, 8] and their classes [n]."""
        if self.taken == self.images_per_epoch:
            self.order = torch.randperm(len(self.images), generator=self.generator)
            self.taken = 0
        batch = self.order[self.taken : self.taken + self.batch_size]
        self.taken += self.batch_size
        return random_shift(self.images[batch], self.shift, self.generator), self.classes[batch]

    def _identity(self) -> dict[str, Any]:
        return {"kind": "digits", "images": len(self.images), "batch_size": self.batch_size}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the epoch's order and the generator's state."""
        return self._identity() | {
            "generator": self.generator.get_state(),
            "order": self.order.clone(),
            "taken": self.taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was that gave the state.

        Raises:
            ValueError: the state is of other data or of another batch size, or damaged.
        """
        check_state(state, self._identity())
        check_generator(state.get("generator"), self.generator.get_state(), "the stream's")
        order, taken = state.get("order"), state.get("taken")
        images = len(self.images)
        if (
            not isinstance(order, Tensor)
            or order.dtype != torch.int64
            or order.numel() not in (0, images)
            or not torch.equal(order.sort().values, torch.arange(order.numel()))
        ):
            raise ContentError("a stream whose order does not name every image once")
        last = self.images_per_epoch
        if not isinstance(taken, int) or taken % self.batch_size or not 0 <= taken <= last:
            raise ContentError(f"a stream that has taken {taken!r:.40} of {last} images")
        if not order.numel() and taken < last:
            raise ContentError("a stream without an order in the middle of its epoch")
        self.generator.set_state(state["generator"])
        self.order = state["order"].clone()
        self.taken = state["taken"]
