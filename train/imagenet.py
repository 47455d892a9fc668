"""Train on ImageNet or other large images: ``torchrun ... -m train.imagenet --data FOLDER``.

The data are folders ``train/<class>/<image>`` and ``val/...`` or WebDataset shards ``train/*.tar``
and ``val/*.tar``. One process per GPU: ``torchrun --nproc-per-node=8 -m train.imagenet``; with
``--folder RUN`` and ``--max-restarts`` a run goes on after its newest checkpoint when a process
dies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dcconv.operator import checks
from train.data.augment import OfficialTransform, Transform, modern_transform
from train.data.images import ImageBatches, ImageStream, find_splits
from train.data.shards import ShardBatches, ShardStream, find_shards
from train.data.stream import Stream
from train.engine import distributed
from train.engine.config import option, parse
from train.engine.loop import launch
from train.recipes import ImageNetRecipe, imagenet_recipes
from train.recipes.flat import ImageNetOptions
from train.task import ImageTask, RecipeRun, presets, share_of_batch, start_from_file

PROGRAM = "python -m train.imagenet"

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ImageNetRun(ImageNetOptions, RecipeRun[ImageNetRecipe]):
    """Everything a run on ImageNet is made of; a preset gives what is not named."""

    kind: ClassVar[type[ImageNetRecipe]] = ImageNetRecipe
    recipes: ClassVar[Mapping[str, ImageNetRecipe]] = imagenet_recipes
    # A saved stream knows its lanes, and whether its data are folders or shards.
    free: ClassVar[frozenset[str]] = RecipeRun.free | {"format", "workers", "lanes", "skip_corrupt"}

    preset: str = option("official", "official, modern, modern_resnet18 or modern_adamw")
    data: str = option("imagenet", "folder with train and val: class folders, or shards *.tar")
    format: Literal["auto", "folders", "shards"] = option("auto", "what the data are")
    workers: int = option(8, "decoding processes of each training process")
    lanes: int | None = option(
        None, "sequences of shards a batch is made of, the same to resume; not given: all workers"
    )
    buffer: int = option(1000, "samples each of them shuffles among")
    skip_corrupt: bool = option(False, "pass over files that cannot be read, and list them")
    sync_norm: bool = option(True, "average mean patch norms over the processes")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("buffer", self.buffer, 1)
        checks.integer("workers", self.workers, 0)


def transform_of(recipe: ImageNetRecipe, train: bool) -> Transform:
    """Return what happens to an image, in training or in evaluation."""
    augment = recipe.augment
    if augment.official:
        return OfficialTransform(train, augment.size, augment.resize)
    return modern_transform(
        train,
        size=augment.size,
        resize=augment.resize,
        trivial=augment.trivial,
        erase=augment.erase,
    )


def has_shards(options: ImageNetRun) -> bool:
    """Return whether the data are shards: as named, or as found."""
    if options.format != "auto":
        return options.format == "shards"
    return any((Path(options.data) / "train").glob("*.tar"))


def load(options: ImageNetRun, device: torch.device) -> tuple[Stream, Batches]:
    """Return this process's training stream and its share of the test images."""
    recipe = options.recipe()
    train, test = transform_of(recipe, True), transform_of(recipe, False)
    common: dict[str, Any] = {
        "device": device,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "workers": options.workers,
        "skip_corrupt": options.skip_corrupt,
    }
    share = share_of_batch(recipe.batch_size, options.accumulate)
    if has_shards(options):
        skip, classes = options.skip_corrupt, options.classes
        stream: Stream = ShardStream(
            find_shards(options.data, "train", skip_corrupt=skip),
            train,
            classes=classes,
            batch_size=share,
            seed=options.seed,
            lanes=options.lanes,
            buffer=options.buffer,
            **common,
        )
        val = find_shards(options.data, "val", skip_corrupt=skip)
        batch = recipe.evaluation_batch
        return stream, ShardBatches(val, test, classes=classes, batch_size=batch, **common)
    images, val_images = find_splits(options.data)
    if len(images.classes) != options.classes:
        rule = f"be the number of class folders in '{options.data}', {len(images.classes)}"
        raise checks.value_error("classes", rule, options.classes)
    stream = ImageStream(images, train, batch_size=share, seed=options.seed, **common)
    return stream, ImageBatches(val_images, test, batch_size=recipe.evaluation_batch, **common)


def build(options: ImageNetRun, device: torch.device) -> ImageTask:
    """Build the task of a run."""
    stream, batches = load(options, device)
    sync_norm = options.sync_norm and distributed.world_size() > 1
    task = ImageTask(options.recipe(), stream, batches, device, sync_norm=sync_norm)
    if options.pretrained is not None and options.is_new():
        start_from_file(task, options.pretrained, options.accumulate)
    return task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.imagenet`` and return its exit status."""
    options = parse(
        ImageNetRun,
        arguments,
        program=PROGRAM,
        description="Train on ImageNet with the official recipe or a current one.",
        presets=presets(imagenet_recipes),
        describe=ImageNetRun.describe,
    ).resolved()
    return launch(
        options,
        lambda device: build(options, device),
        program=PROGRAM,
        name=f"imagenet_{options.preset}",
        facts=options.facts | {"data": f"{options.classes} classes"},
    )


if __name__ == "__main__":
    sys.exit(main())
