"""A recipe: everything that decides a training but for its data, seed and machine."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

import dcconv
from dcconv.operator import checks
from train.networks import build_network, find_operator, networks
from train.networks.operators import Operator
from train.recipes.losses import Loss
from train.recipes.schedules import Optimizer, Schedule, lr_at, make_optimizer, set_step

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and how it is trained. Iterations are counted from 0.

    Args:
        name: what ``--preset`` calls it.
        network: a key of ``train.networks.networks``.
        operator: the name of its convolutions, ``conv`` for the plain baseline.
        classes: number of outputs.
        optimizer, schedule, loss: see their classes.
        steps: iterations in all.
        batch_size: training images in an iteration, over all ranks.
        evaluate_every, save_every, log_every: iterations between these; 0 for the first two: only
            at the end.
        evaluation_batch: test images at a time.
        norm: with batch normalisation.
        official: the official code's moving averages.
        block4, widths: of the network; None takes the network's own.
        project_every: filters are projected after iterations that are multiples of this, but for
            iteration 0; 0 never projects.
        weighted_gradients: multiply every decoupled filter's gradient by its norm.
        ema: how much of the averaged weights stays at an iteration, say 0.999; 0 keeps none.
        amp: ``none``, ``bf16`` or ``fp16``.
        channels_last, compile: how the network runs.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it.
    """

    name: str
    network: str
    operator: str
    classes: int
    optimizer: Optimizer
    schedule: Schedule
    loss: Loss
    steps: int
    batch_size: int
    evaluate_every: int
    evaluation_batch: int
    save_every: int
    log_every: int = 100
    norm: bool = True
    official: bool = False
    block4: bool | None = None
    widths: tuple[int, ...] | None = None
    project_every: int = 0
    weighted_gradients: bool = False
    ema: float = 0.0
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        checks.choice("network", self.network, networks)
        operator = find_operator(self.operator)
        for argument in ("classes", "steps", "batch_size", "evaluation_batch", "log_every"):
            checks.integer(argument, getattr(self, argument), 1)
        for argument in ("evaluate_every", "save_every"):
            checks.integer(argument, getattr(self, argument), 0)
        checks.integer("project_every", self.project_every, 0)
        checks.choice("amp", self.amp, ("none", "bf16", "fp16"))
        checks.number("ema", self.ema, "be in [0, 1)", 0.0, closed=True)
        if self.ema >= 1:
            raise checks.value_error("ema", "be in [0, 1)", self.ema)
        if self.project_every and not operator.projectable:
            raise checks.value_error(
                "project_every", f"be 0 for operator '{operator.name}'", self.project_every
            )
        if operator.magnitude is None and self.loss.orthogonality:
            rule = f"be 0 for operator '{operator.name}'"
            raise checks.value_error("orthogonality", rule, self.loss.orthogonality)
        if operator.magnitude is None and self.weighted_gradients:
            rule = f"be False for operator '{operator.name}'"
            raise checks.value_error("weighted_gradients", rule, True)

    @property
    def convolution(self) -> Operator:
        """The operator behind the name."""
        return find_operator(self.operator)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an iteration."""
        return lr_at(self.optimizer, self.schedule, step, self.steps)


@dataclass(frozen=True, kw_only=True)
class CifarAugment:
    """What happens to training images of 32 x 32 pixels, in the units of the stored images.

    ``padding`` pixels on every side by ``mode`` (``symmetric``, ``reflect`` or ``zeros``), a random
    crop to the old size, a random flip, (image - mean) / std, and a square of ``cutout`` pixels
    set to 0. Test images are normalised alone.
    """

    padding: int = 4
    mode: str = "symmetric"
    flip: bool = True
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (128.0,)
    cutout: int = 0


@dataclass(frozen=True, kw_only=True)
class ImageNetAugment:
    """What happens to large images.

    ``official`` resizes to a square, crops at random and flips, and subtracts the mean; otherwise
    random resized crops, normalised by mean and deviation. ``trivial`` adds TrivialAugment and
    ``erase`` is the probability of erasing a random part, both not officially.
    """

    official: bool = False
    size: int = 224
    resize: int = 256
    trivial: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.official and self.trivial:
            raise checks.value_error("trivial", "be False with official_images", True)
        if self.official and self.erase:
            raise checks.value_error("erase", "be 0 with official_images", self.erase)


@dataclass(frozen=True, kw_only=True)
class CifarRecipe(Recipe):
    """A recipe for CIFAR-10 and CIFAR-100."""

    augment: CifarAugment = CifarAugment()


@dataclass(frozen=True, kw_only=True)
class ImageNetRecipe(Recipe):
    """A recipe for ImageNet."""

    augment: ImageNetAugment = ImageNetAugment()


def for_operator(recipe: AnyRecipe, name: str) -> AnyRecipe:
    """Return the recipe with another operator, without what contradicts it.

    Weighted operators are not projected, since their magnitude is the filter's norm; the plain
    convolution has no projection, no penalty on correlated filters and no weighted gradients.
    """
    operator = find_operator(name)
    if operator.magnitude is None:
        loss = replace(recipe.loss, orthogonality=0.0)
        return replace(recipe, operator=name, project_every=0, loss=loss, weighted_gradients=False)
    every = recipe.project_every if operator.projectable else 0
    return replace(recipe, operator=name, project_every=every)


def with_steps(recipe: AnyRecipe, steps: int) -> AnyRecipe:
    """Return the recipe in so many iterations; warmup and drops move in proportion."""
    checks.integer("steps", steps, 1)
    schedule = recipe.schedule.scaled(steps / recipe.steps)
    return replace(recipe, steps=steps, schedule=schedule)


def build(recipe: Recipe, *, sync_norm: bool = False) -> nn.Module:
    """Build the recipe's untrained network; ``sync_norm`` averages mean norms over the ranks."""
    return build_network(
        recipe.network,
        recipe.operator,
        recipe.classes,
        norm=recipe.norm,
        official=recipe.official,
        sync_norm=sync_norm,
        widths=recipe.widths,
        block4=recipe.block4,
    )


def start(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser, and weigh gradients where the recipe does."""
    if recipe.weighted_gradients:
        dcconv.register_weighted_gradients(network)
    return make_optimizer(network, recipe.optimizer)


def average_of(network: nn.Module, recipe: Recipe) -> nn.Module | None:
    """Return the moving average of the weights, a copy to evaluate, if the recipe keeps one.

    It also averages the moving statistics. :func:`after_step` updates it.
    """
    return deepcopy(network).requires_grad_(False) if recipe.ema else None


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move averaged weights and statistics to ``decay`` of themselves and the rest of the network.

    Counters are copied. ``torch.optim.swa_utils.AveragedModel`` counts its updates on the CPU, and
    every one of them makes the CPU wait for the GPU.
    """
    averaged = (*average.parameters(), *average.buffers())
    current = (*network.parameters(), *network.buffers())
    pairs = list(zip(averaged, current, strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], 1.0 - decay)
    if counters:
        torch._foreach_copy_([old for old, _ in counters], [new for _, new in counters])


def before_step(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Set the optimiser up for an iteration and return its learning rate."""
    return set_step(optimizer, recipe.optimizer, recipe.schedule, step, recipe.steps)


def after_step(
    network: nn.Module, recipe: Recipe, step: int, average: nn.Module | None = None
) -> None:
    """Project the filters if it is their turn, then update the averaged weights."""
    if recipe.project_every and step and step % recipe.project_every == 0:
        dcconv.project_weights(network)
    if average is not None:
        # The first update forgets the weights that training began with.
        update_average(average, network, recipe.ema if step else 0.0)
