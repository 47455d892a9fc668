"""Recipes as flat options, one flag each, for the runners' command lines and YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from train.engine.config import option
from train.recipes.losses import Loss
from train.recipes.recipe import (
    AnyRecipe,
    CifarAugment,
    CifarRecipe,
    ImageNetAugment,
    ImageNetRecipe,
    for_operator,
)
from train.recipes.schedules import Optimizer, Schedule

# Fields of a recipe's parts whose option has another name.
_NAMES = {
    ("optimizer", "kind"): "optimizer",
    ("schedule", "kind"): "schedule",
    ("schedule", "factor"): "drop_factor",
    ("schedule", "floor"): "lr_floor",
    ("loss", "offset"): "log_offset",
    ("augment", "mode"): "padding_mode",
    ("augment", "official"): "official_images",
    ("augment", "size"): "image_size",
}
_PARTS: dict[str, dict[type, type]] = {
    "optimizer": {CifarRecipe: Optimizer, ImageNetRecipe: Optimizer},
    "schedule": {CifarRecipe: Schedule, ImageNetRecipe: Schedule},
    "loss": {CifarRecipe: Loss, ImageNetRecipe: Loss},
    "augment": {CifarRecipe: CifarAugment, ImageNetRecipe: ImageNetAugment},
}


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options of a recipe that the engine does not have itself; defaults are never used.

    A preset or a stored configuration gives every one. See :class:`train.recipes.Recipe`.
    """

    network: str = option("resnet32", "resnet32, cnn9, modified_resnet18 or resnet18")
    operator: str = option("tanh_cosine", "conv or <magnitude>_<angular>; see the README")
    norm: bool = option(True, "batch normalisation")
    official: bool = option(False, "the official code's moving averages: slow, from zero")
    block4: bool | None = option(None, "last residual unit of modified_resnet18")
    widths: tuple[int, ...] | None = option(None, "channels of the network's stages")
    batch_size: int = option(128, "training images in a step, over all processes")
    evaluation_batch: int = option(100, "test images at a time")
    optimizer: Literal["adam", "adamw", "sgd"] = option("adam", "optimiser")
    lr: float = option(1e-3, "largest learning rate")
    betas: tuple[float, ...] = option((0.9, 0.999), "Adam's")
    eps: float = option(1e-8, "Adam's")
    tensorflow_eps: bool = option(False, "add Adam's eps where TensorFlow does")
    momentum: float = option(0.0, "of SGD")
    nesterov: bool = option(False, "Nesterov's form of momentum")
    weight_decay: float = option(0.0, "by the optimiser, of plain filters alone")
    schedule: Literal["steps", "cosine"] = option("steps", "how the learning rate falls")
    drops: tuple[int, ...] = option((), "steps from which the learning rate is lower")
    drop_factor: float = option(0.1, "what each of them multiplies it by")
    warmup: int = option(0, "steps in which the learning rate rises")
    lr_floor: float = option(0.0, "share of the learning rate at which cosine ends")
    smoothing: float = option(0.0, "of the labels")
    log_offset: float = option(0.0, "added to probabilities inside the logarithm")
    l2: float = option(0.0, "decay in the loss of plain filters, scales and offsets")
    orthogonality: float = option(0.0, "penalty on correlated filters; conv has none")
    project_every: int = option(
        0, "steps between projections of filters; 0, conv and weighted operators: none"
    )
    weighted_gradients: bool = option(False, "multiply filters' gradients by their norms")
    ema: float = option(0.0, "decay of averaged weights; 0: none")


@dataclass(frozen=True, kw_only=True)
class CifarOptions(RecipeOptions):
    """The options of a CIFAR recipe."""

    padding: int = option(4, "pixels around an image before it is cropped")
    padding_mode: Literal["symmetric", "reflect", "zeros"] = option("symmetric", "what they are")
    flip: bool = option(True, "random horizontal flips")
    mean: tuple[float, ...] = option((127.5,), "subtracted from pixels, one or per channel")
    std: tuple[float, ...] = option((128.0,), "pixels are divided by, one or per channel")
    cutout: int = option(0, "side of a square that is cut out; 0: none")


@dataclass(frozen=True, kw_only=True)
class ImageNetOptions(RecipeOptions):
    """The options of an ImageNet recipe."""

    official_images: bool = option(False, "the official resizing, cropping and normalisation")
    image_size: int = option(224, "rows and columns of the network's input")
    resize: int = option(256, "size before the crop")
    trivial: bool = option(False, "TrivialAugment")
    erase: float = option(0.0, "probability of erasing a random part")


def flat(recipe: CifarRecipe | ImageNetRecipe) -> dict[str, Any]:
    """Return a recipe as options by name, without its own name and the number of classes.

    Example:
        >>> from train.recipes import cifar_recipes
        >>> flat(cifar_recipes["tanh_cos"])["log_offset"]
        0.0001
    """
    values: dict[str, Any] = {}
    for item in fields(recipe):
        value = getattr(recipe, item.name)
        if is_dataclass(value):
            for part in fields(value):
                name = _NAMES.get((item.name, part.name), part.name)
                values[name] = getattr(value, part.name)
        elif item.name not in ("name", "classes"):
            values[item.name] = value
    return values


def unflat(
    kind: type[AnyRecipe], values: Mapping[str, Any], *, name: str, classes: int
) -> AnyRecipe:
    """Return the recipe that options describe; those that are not a recipe's are passed over.

    What the operator rules out is left out, see :func:`for_operator`.

    Args:
        kind: ``CifarRecipe`` or ``ImageNetRecipe``.
        values: options by name, all that :func:`flat` gives.
        name: of the recipe.
        classes: of the data.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it.
    """
    arguments: dict[str, Any] = {"name": name, "classes": classes}
    for item in fields(kind):
        if item.name in _PARTS:
            part = _PARTS[item.name][kind]
            arguments[item.name] = part(
                **{
                    inner.name: values[_NAMES.get((item.name, inner.name), inner.name)]
                    for inner in fields(part)
                }
            )
        elif item.name not in arguments:
            arguments[item.name] = values[item.name]
    # The operator may rule out what came with another one: build without it, then put it in.
    operator = arguments.pop("operator")
    recipe = kind(**arguments, operator="tanh_cosine")
    return for_operator(recipe, operator)
