"""What a training consists of, as data: networks, losses, optimisers and schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from dcconv.operator.checks import type_error, value_error
from train.recipes.losses import Loss, cross_entropy, l2_tensors, loss_terms, total
from train.recipes.modern import modern_cifar_recipes, modern_imagenet_recipes
from train.recipes.official import official_cifar, official_cifar_recipes, official_imagenet
from train.recipes.paper import Cell, paper_cells
from train.recipes.recipe import (
    AnyRecipe,
    CifarAugment,
    CifarRecipe,
    ImageNetAugment,
    ImageNetRecipe,
    Recipe,
    after_step,
    average_of,
    before_step,
    build,
    for_operator,
    start,
    with_steps,
)
from train.recipes.schedules import Optimizer, Schedule

__all__ = [
    "Cell",
    "CifarAugment",
    "CifarRecipe",
    "ImageNetAugment",
    "ImageNetRecipe",
    "Loss",
    "Optimizer",
    "Recipe",
    "Schedule",
    "after_step",
    "average_of",
    "before_step",
    "build",
    "cifar_recipes",
    "cross_entropy",
    "find_recipe",
    "for_operator",
    "imagenet_recipes",
    "l2_tensors",
    "loss_terms",
    "official_cifar",
    "paper_cells",
    "start",
    "total",
    "with_steps",
]

#: Every preset of ``python -m train.cifar``.
cifar_recipes: dict[str, CifarRecipe] = (
    official_cifar_recipes
    | modern_cifar_recipes
    | {name: cell.recipe for name, cell in paper_cells.items()}
)

#: Every preset of ``python -m train.imagenet``.
imagenet_recipes: dict[str, ImageNetRecipe] = {
    official_imagenet.name: official_imagenet
} | modern_imagenet_recipes


def find_recipe(recipes: Mapping[str, AnyRecipe], name: object) -> AnyRecipe:
    """Return the recipe of a preset's name.

    Raises:
        TypeError, ValueError: the name is no known one; the message says what names there are.

    Example:
        >>> find_recipe(cifar_recipes, "table3/seg_sqcos_no_relu").operator
        'segmented_square_cosine_no_activation'
    """
    plain = [known for known in recipes if "/" not in known]
    rule = f"be one of {', '.join(plain)}"
    if len(plain) < len(recipes):
        rule += ", or a cell of the paper's tables, which --list shows"
    if not isinstance(name, str):
        raise type_error("preset", rule, type(name).__name__)
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise value_error("preset", rule, repr(name) + hint)
