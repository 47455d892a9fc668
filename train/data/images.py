"""Folders of images, ``train/<class>/<image>`` and ``val/<class>/<image>``, JPEG or PNG.

Worker processes decode and transform; every image's random numbers follow from the seed, the
epoch and the image alone, so that neither the number of workers nor of ranks changes them. A file
that cannot be decoded ends the run with its name, or is counted and replaced where that was asked
for.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from dcconv.operator import checks
from dcconv.operator.checks import value_error
from train.data.augment import Transform
from train.data.stream import (
    AUGMENT,
    ORDER,
    Cursor,
    check_batch,
    check_share,
    check_state,
    derive_seed,
    read_cursor,
    take,
)
from train.engine.files import MOST_IMAGE, read_file

SUFFIXES = (".jpg", ".jpeg", ".png")
# Batches that each worker prepares ahead.
AHEAD = 2
# Of an image, where Pillow begins to warn: 0.3 GB decoded. ImageNet's largest has 61 million.
MOST_PIXELS = 89_478_485

_log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A file, or part of a shard, that cannot be read, and the sentence that says why."""

    name: str
    sentence: str


class Chunk(NamedTuple):
    """What a worker hands over: images [n, c, h, w], labels [n], and what it could not read."""

    images: Tensor
    labels: Tensor
    failures: list[Failure]


def pixels_of(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image of any mode as [h, w, 3] of 0 to 255, for the range of its own mode.

    Grey is repeated, of sixteen bits the upper eight are taken, as Pillow does it in colour, a
    palette is looked up, inks and luminance are converted. Transparency is left off, so that hidden
    colours show, as in other libraries' loaders for training.

    Raises:
        ValueError: the mode has no range of its own, or the image leaves it.

    Example:
        >>> pixels_of(Image.new("I;16", (1, 1), 0x1234)).tolist() == [[[0x12, 0x12, 0x12]]]
        True
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        # Of 32 bits, but that is how some versions of Pillow open 16.
        low, high = int(grey.min(initial=0)), int(grey.max(initial=0))
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"grey from {low} to {high}, beyond 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("mode F, whose range is not known")
    if image.mode in ("P", "PA"):
        # By this way a palette with transparency is no reason for a warning.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def decode(content: bytes) -> Tensor:
    """Return a JPEG or PNG image as [3, h, w] uint8; see :func:`pixels_of`.

    Raises:
        ValueError: it is neither, damaged, or too large; the message is only the reason.
    """
    try:
        with warnings.catch_warnings():
            # What Pillow warns of is refused here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}"
                    )
                pixels = pixels_of(image)
    except UnidentifiedImageError as error:
        raise ValueError("something else") from error
    # A damaged image can fail in any way.
    except Exception as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def transform_with_seed(transform: Transform, image: Tensor, seed: int) -> Tensor:
    """Apply a transform that draws from the CPU's global generator, which stays as it was."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        return transform(image)
    finally:
        generator.set_state(before)


def image_failure(name: str, error: Exception) -> Failure:
    """Return the sentence for an image that cannot be decoded."""
    subject = f"image '{name}'"
    return Failure(name, str(value_error(subject, "be a whole JPEG or PNG file", error)))


class Reports:
    """What was skipped, by name; each is logged once."""

    def __init__(self, skip_corrupt: bool) -> None:
        self.skip_corrupt = skip_corrupt
        self.skipped: dict[str, str] = {}

    def add(self, failures: Sequence[Failure]) -> None:
        """Note failures of a chunk.

        Raises:
            ValueError: they are not to be skipped.
        """
        for name, sentence in failures:
            if not self.skip_corrupt:
                raise ValueError(sentence)
            if name not in self.skipped:
                self.skipped[name] = sentence
                _log.warning("skipped: %s", sentence)


def to_device(tensors: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Move a batch; from pinned memory without waiting."""
    images, labels = tensors
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _leave_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the process that trains, and end only when that one says so.

    Terminals, torchrun and schedulers signal every process of a group. A worker that died of it
    would take the training down before the step is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Return what all loaders here have in common."""
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": _leave_signals,
    }
    # The loader draws a seed for its workers; from this generator, the global one stays untouched.
    options["generator"] = torch.Generator().manual_seed(0)
    return options | ({"prefetch_factor": AHEAD} if workers else {})


class ImageSet(NamedTuple):
    """Files with their labels, which index ``classes``."""

    files: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]


def find_images(data: str | Path, split: str) -> ImageSet:
    """List the images of ``<data>/<split>/<class>/``, classes and files in alphabetical order.

    Raises:
        ValueError: there is no such folder, or a class without images.
    """
    folder = Path(data) / split
    rule = f"hold {split}/<class>/<image>.jpg (or .jpeg, .png); nothing is downloaded"
    if not folder.is_dir():
        raise value_error("data", rule, f"'{data}' without a folder {split}")
    try:
        found = ImageFolder(str(folder), is_valid_file=_is_image)
    except FileNotFoundError as error:
        got = str(error).partition("\n")[0].split(". ")[0].rstrip(".")
        raise value_error("data", rule, f"'{data}' ({got})") from error
    return ImageSet(tuple(found.samples), tuple(found.classes))


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def find_splits(data: str | Path) -> tuple[ImageSet, ImageSet]:
    """Return the images of ``train`` and ``val``, which must have the same classes."""
    train, val = find_images(data, "train"), find_images(data, "val")
    if train.classes != val.classes:
        other = sorted(set(train.classes) ^ set(val.classes))
        rule = "have the same class folders in train and val"
        raise value_error("data", rule, f"'{data}' with {other[0]!r} in one of them only")
    return train, val


class _Training(Dataset[tuple[Tensor | None, int, list[Failure]]]):
    """Decodes image ``index`` for ``epoch``; the next file stands in for one that is skipped."""

    def __init__(
        self, images: ImageSet, transform: Transform, seed: int, skip_corrupt: bool
    ) -> None:
        self.files = images.files
        self.transform = transform
        self.seed = seed
        self.skip_corrupt = skip_corrupt

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, list[Failure]]:
        epoch, index = key
        seed = derive_seed(AUGMENT, self.seed, epoch, index)
        failures: list[Failure] = []
        for ahead in range(len(self.files) if self.skip_corrupt else 1):
            path, label = self.files[(index + ahead) % len(self.files)]
            image = _load(path)
            if isinstance(image, Tensor):
                return transform_with_seed(self.transform, image, seed), label, failures
            failures.append(image)
        return None, 0, failures


class _Evaluation(Dataset[tuple[Tensor | None, int, list[Failure]]]):
    def __init__(self, files: Sequence[tuple[str, int]], transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, list[Failure]]:
        path, label = self.files[index]
        image = _load(path)
        if isinstance(image, Failure):
            return None, 0, [image]
        return self.transform(image), label, []


def _load(path: str) -> Tensor | Failure:
    try:
        content = read_file(Path(path), MOST_IMAGE)
    except OSError as error:
        rule = "be a readable file"
        return Failure(path, str(value_error(f"image '{path}'", rule, error.strerror)))
    try:
        return decode(content)
    except ValueError as error:
        return image_failure(path, error)


def collate(samples: Sequence[tuple[Tensor | None, int, list[Failure]]]) -> Chunk:
    """Stack the images that there are, and gather the failures."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    failures = [failure for _, _, failed in samples for failure in failed]
    stacked = torch.stack(images) if images else torch.empty(0)
    return Chunk(stacked, torch.tensor(labels, dtype=torch.int64), failures)


class _Order:
    """A rank's batches of (epoch, index) from a cursor on, without end."""

    def __init__(self, stream: ImageStream) -> None:
        self.cursor = stream.cursor
        self.images = stream.images_per_epoch
        self.seed = stream.seed
        self.batch = stream.batch_size * stream.world_size
        self.share = slice(stream.rank * stream.batch_size, (stream.rank + 1) * stream.batch_size)
        self.wrap = stream.wrap

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        cursor, orders = self.cursor, dict[int, list[int]]()
        while True:
            spans, cursor = take(cursor, self.batch, self.images, self.wrap)
            keys = []
            for epoch, start, stop in spans:
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(derive_seed(ORDER, self.seed, epoch))
                    orders = {epoch: torch.randperm(self.images, generator=generator).tolist()}
                keys += [(epoch, index) for index in orders[epoch][start:stop]]
            yield keys[self.share]


class ImageStream:
    """Training batches from image files, decoded by worker processes ahead of their use.

    Args:
        images: the training images.
        transform: what happens to each.
        batch_size: images of one rank per batch.
        seed: decides the order and the augmentation.
        device: where batches appear.
        rank: which share of every batch this process takes.
        world_size: number of shares.
        workers: decoding processes of this rank; 0 decodes in this one. Any number gives the
            same batches.
        wrap: let batches run from one epoch into the next; else drop the rest of an epoch.
        skip_corrupt: put the next file in the place of one that cannot be decoded, and list it
            in ``skipped``; else raise ValueError with its name.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        wrap: bool = True,
        skip_corrupt: bool = False,
    ) -> None:
        check_share(batch_size, rank, world_size)
        checks.integer("seed", seed, 0)
        checks.integer("workers", workers, 0)
        self.images_per_epoch = len(images.files)
        check_batch(batch_size, world_size, self.images_per_epoch, wrap)
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.wrap = wrap
        self.cursor = Cursor()
        self._dataset = _Training(images, transform, seed, skip_corrupt)
        self._reports = Reports(skip_corrupt)
        self._batches: Iterator[Chunk] | None = None

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be decoded, and why."""
        return self._reports.skipped

    def next(self) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the next batch.

        Raises:
            ValueError: an image cannot be decoded and is not to be skipped.
        """
        if self._batches is None:
            self._batches = iter(
                DataLoader(
                    self._dataset,
                    batch_sampler=_Order(self),
                    collate_fn=collate,
                    **loader_options(self.workers, self.device),
                )
            )
        chunk = next(self._batches)
        self._reports.add(chunk.failures)
        if len(chunk.labels) < self.batch_size:
            raise value_error("data", "hold an image that can be decoded", "none")
        batch = self.batch_size * self.world_size
        _, self.cursor = take(self.cursor, batch, self.images_per_epoch, self.wrap)
        return to_device((chunk.images, chunk.labels), self.device)

    def _identity(self) -> dict[str, Any]:
        return {"kind": "images", "images": self.images_per_epoch, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Return the position; it holds for any number of ranks and workers."""
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
        self.close()

    def close(self) -> None:
        """End the worker processes; ``next`` starts new ones."""
        self._batches = None


class ImageBatches:
    """Every image once, in order, for evaluation; what ``TensorBatches`` says of ranks holds.

    An image that is skipped is missing from its batch, and listed in ``skipped``.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        skip_corrupt: bool = False,
    ) -> None:
        check_share(batch_size, rank, world_size)
        checks.integer("workers", workers, 0)
        self._dataset = _Evaluation(images.files[rank::world_size], transform)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.workers = workers
        self._reports = Reports(skip_corrupt)

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be decoded, and why."""
        return self._reports.skipped

    def __len__(self) -> int:
        return -(-len(self._dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._dataset,
            self.batch_size,
            collate_fn=collate,
            **loader_options(self.workers, self.device),
        )
        for chunk in loader:
            self._reports.add(chunk.failures)
            if len(chunk.labels):
                yield to_device((chunk.images, chunk.labels), self.device)
