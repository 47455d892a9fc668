"""Train on CIFAR-10 or CIFAR-100: ``python -m train.cifar --preset tanh_cos --data FOLDER``.

The presets tanh_cos, ball_cos, seg_cos, linear_cos and linear_sqcos_wo_bn are the official
experiments, the others current recipes and every cell of the paper's Tables 1 to 3 (``--list``).
Every operator goes with every preset: ``--operator``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table

from dcconv.operator import checks
from train.data.augment import Augment
from train.data.cifar import Cifar, load_cifar
from train.data.stream import TensorBatches, TensorStream
from train.engine import distributed
from train.engine.config import option, parse
from train.engine.loop import launch
from train.engine.terminal import SpellingConsole
from train.recipes import CifarRecipe, cifar_recipes, paper_cells
from train.recipes.flat import CifarOptions
from train.task import ImageTask, RecipeRun, presets, share_of_batch, start_from_file

PROGRAM = "python -m train.cifar"

# Columns of --list where the output has no width of its own.
LIST_WIDTH = 190


@dataclass(frozen=True, kw_only=True)
class CifarRun(CifarOptions, RecipeRun[CifarRecipe]):
    """Everything a run on CIFAR is made of; a preset gives what is not named."""

    kind: ClassVar[type[CifarRecipe]] = CifarRecipe
    recipes: ClassVar[Mapping[str, CifarRecipe]] = cifar_recipes
    free: ClassVar[frozenset[str]] = RecipeRun.free | {"verify"}

    preset: str = option("tanh_cos", "base of the options; --list shows all")
    classes: int = option(100, "10 or 100")
    data: str = option("data", "folder with the official archive, or what was extracted from it")
    verify: bool = option(True, "require the official files, by checksum")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes not in (10, 100):
            raise checks.value_error("classes", "be 10 or 100", self.classes)
        for argument in ("mean", "std"):
            if len(getattr(self, argument)) not in (1, 3):
                rule = "be one number, or one for each of three channels"
                raise checks.value_error(argument, rule, getattr(self, argument))


def build(options: CifarRun, data: Cifar, device: torch.device) -> ImageTask:
    """Build the task of a run from its data."""
    recipe = options.recipe()
    augment = Augment(**asdict(recipe.augment))
    rank, world_size = distributed.rank(), distributed.world_size()
    share: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "augment": augment,
    }
    stream = TensorStream(
        data.train_images,
        data.train_labels,
        batch_size=share_of_batch(recipe.batch_size, options.accumulate),
        seed=options.seed,
        **share,
    )
    batches = TensorBatches(
        data.test_images, data.test_labels, batch_size=recipe.evaluation_batch, **share
    )
    task = ImageTask(recipe, stream, batches, device, sync_norm=world_size > 1)
    if options.pretrained is not None and options.is_new():
        start_from_file(task, options.pretrained, options.accumulate)
    return task


def show_presets() -> None:
    """Print every preset with what it is and, for cells of the paper's tables, its error there."""
    console = SpellingConsole(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = LIST_WIDTH
    table = Table("command", "network", "operator", "what", "paper's error %", box=None)
    for name, recipe in cifar_recipes.items():
        cell = paper_cells.get(name)
        what = "official" if recipe.official else "current"
        error = ""
        if cell is not None:
            what = f"Table {cell.table}: {cell.method}"
            error = "not converged" if cell.error is None else f"{cell.error:.2f}"
        table.add_row(f"{PROGRAM} --preset {name}", recipe.network, recipe.operator, what, error)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.cifar`` and return its exit status."""
    options = parse(
        CifarRun,
        arguments,
        program=PROGRAM,
        description="Train on CIFAR-10 or CIFAR-100 with the paper's recipes or current ones.",
        presets=presets(cifar_recipes),
        actions={"list": ("show every preset and end", show_presets)},
        describe=CifarRun.describe,
    ).resolved()

    def make(device: torch.device) -> ImageTask:
        return build(
            options, load_cifar(options.data, options.classes, verify=options.verify), device
        )

    return launch(
        options,
        make,
        program=PROGRAM,
        name=f"cifar{options.classes}_{options.preset.replace('/', '_')}",
        facts=options.facts | {"data": f"CIFAR-{options.classes}"},
    )


if __name__ == "__main__":
    sys.exit(main())
