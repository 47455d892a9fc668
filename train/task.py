"""Image classification by a recipe: the options and the engine's task of CIFAR and ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv.operator import checks
from train.data.stream import Stream
from train.engine import distributed
from train.engine.checkpoint import Checkpoints
from train.engine.config import EngineOptions, option
from train.engine.folder import RunFolder
from train.engine.loop import AMP_DTYPES
from train.engine.signals import StopRequestedError, stop_requested
from train.networks.pretrained import load_plain, start_from_plain
from train.recipes import (
    CifarRecipe,
    ImageNetRecipe,
    Recipe,
    after_step,
    average_of,
    before_step,
    build,
    find_recipe,
    loss_terms,
    start,
    total,
    with_steps,
)
from train.recipes.flat import flat, unflat

AnyRecipe = TypeVar("AnyRecipe", CifarRecipe, ImageNetRecipe)
AnyRun = TypeVar("AnyRun", bound="RecipeRun[Any]")

# Images that statistics are estimated from when a plain network is taken over.
ESTIMATION_IMAGES = 5000


@dataclass(frozen=True, kw_only=True)
class RecipeRun(EngineOptions, Generic[AnyRecipe]):
    """What a run by a recipe is made of; the runner mixes in the recipe's own options.

    A preset gives what is not named. ``length`` shortens a preset as a whole.
    """

    kind: ClassVar[type[Any]]
    recipes: ClassVar[Mapping[str, Any]]
    free: ClassVar[frozenset[str]] = EngineOptions.free | {"data", "length", "evaluation_batch"}

    preset: str = option("", "base of the options")
    classes: int = option(1000, "classes of the data")
    data: str = option("data", "folder of the data")
    length: float | None = option(None, "multiplies the preset's steps, drops and warmup")
    pretrained: str | None = option(
        None, "plain network to start from: filters are projected, statistics estimated anew"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("classes", self.classes, 1)
        if self.length is not None:
            checks.number("length", self.length, "be a finite number above 0", 0.0)
        self.recipe()

    def recipe(self) -> AnyRecipe:
        """Return the recipe that the options describe."""
        base = find_recipe(self.recipes, self.preset)
        values = asdict(self)
        if values["network"] != base.network and values["block4"] == base.block4:
            # It came with the preset's network.
            values["block4"] = None
        recipe: AnyRecipe = unflat(self.kind, values, name=self.preset, classes=self.classes)
        if self.length is None:
            return recipe
        scaled = with_steps(base, max(round(base.steps * self.length), 1))
        # A run that goes on has the scaled numbers already.
        if _times(recipe) not in (_times(base), _times(scaled)):
            rule = "be left out where steps, drops or warmup are not the preset's"
            raise checks.value_error("length", rule, self.length)
        times = replace(recipe.schedule, drops=scaled.schedule.drops, warmup=scaled.schedule.warmup)
        return replace(recipe, steps=scaled.steps, schedule=times)

    def resolved(self: AnyRun) -> AnyRun:
        """Return the options with the numbers of steps that will be done, without a length."""
        steps, drops, warmup = _times(self.recipe())
        values: dict[str, Any] = {"steps": steps, "drops": drops, "warmup": warmup}
        return replace(self, length=None, **values)

    def is_new(self) -> bool:
        """Return whether the run has no checkpoint to go on from."""
        folder = self.folder if self.resume is None else self.resume
        return folder is None or Checkpoints(RunFolder(Path(folder)).checkpoints).last_step is None

    def describe(self) -> str:
        """Return what a run would do, in a few lines."""
        recipe = self.recipe()
        first, last = recipe.lr_at(0), recipe.lr_at(recipe.steps - 1)
        return (
            f"{recipe.network} with {recipe.operator}, {self.classes} classes, data {self.data}\n"
            f"{recipe.steps} steps of {recipe.batch_size} images, learning rate {first:g} at the "
            f"first and {last:g} at the last"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the results of a run say besides figures."""
        recipe = self.recipe()
        return {"preset": self.preset, "network": recipe.network, "operator": recipe.operator}


def _times(recipe: Recipe) -> tuple[int, tuple[int, ...], int]:
    return recipe.steps, recipe.schedule.drops, recipe.schedule.warmup


def presets(recipes: Mapping[str, CifarRecipe | ImageNetRecipe]) -> dict[str, dict[str, Any]]:
    """Return recipes as values of options, by name."""
    return {name: flat(recipe) | {"classes": recipe.classes} for name, recipe in recipes.items()}


def share_of_batch(batch_size: int, accumulate: int) -> int:
    """Return the images of one process in one forward pass, of a step's images in all.

    Raises:
        ValueError: they cannot be shared evenly.

    Example:
        >>> share_of_batch(128, 2)
        64
    """
    parts = distributed.world_size() * accumulate
    if batch_size % parts:
        rule = f"be a multiple of processes times accumulate, {parts}"
        raise checks.value_error("batch_size", rule, batch_size)
    return batch_size // parts


class ImageTask:
    """A recipe's network, optimiser, losses and schedule on a stream of labelled images.

    Args:
        recipe: what to train and how.
        stream: training batches.
        batches: this process's share of the test images, once around per evaluation.
        device: where the network is.
        sync_norm: average mean patch norms over the processes.
    """

    forward_network: Callable[..., Any]

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        batches: Iterable[tuple[Tensor, Tensor]],
        device: torch.device,
        *,
        sync_norm: bool = False,
    ) -> None:
        self.recipe = recipe
        self.stream = stream
        self.batches = batches
        self.device = device
        self.network: nn.Module = build(recipe, sync_norm=sync_norm).to(device)
        if recipe.channels_last:
            # Before it is copied: averages of another format are slow to update and to evaluate.
            self.network.to(memory_format=torch.channels_last)
        self.forward_network = self.network
        self.optimizer = start(self.network, recipe)
        groups = self.optimizer.param_groups
        self._constants = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.average = average_of(self.network, recipe)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the recipe's loss and its terms."""
        logits = self.forward_network(images)
        terms = loss_terms(self.network, logits, labels, self.recipe.loss)
        return total(terms), terms

    def before_step(self, step: int) -> None:
        """Set the learning rate."""
        before_step(self.optimizer, self.recipe, step)

    def after_step(self, step: int) -> None:
        """Project the filters and average the weights, as the recipe has it."""
        after_step(self.network, self.recipe, step, self.average)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return accuracies (%) and the cross entropy over all test images of all processes.

        The averaged weights are evaluated where the recipe keeps them.

        Raises:
            StopRequestedError: a signal asked a process to stop.
        """
        network: nn.Module = self.network if self.average is None else self.average
        network.eval()
        if distributed.world_size() > 1:
            # Each process has averaged statistics of its own batches; rank 0's are what is saved.
            buffers = distributed.broadcast(dict(network.named_buffers()))
            network.load_state_dict(buffers, strict=False)
        amp = AMP_DTYPES.get(self.recipe.amp)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for images, labels in self.batches:
            # What torchrun or a scheduler leaves of time is for the checkpoint.
            if stop_requested():
                break
            if self.recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, amp, enabled=amp is not None):
                logits = network(images)
            logits = logits.float()
            best = logits.topk(min(5, self.recipe.classes), dim=1).indices == labels[:, None]
            fit = F.cross_entropy(logits, labels, reduction="sum")
            counts = (best[:, 0].sum(), best.sum(), fit, labels.numel())
            sums += torch.stack([torch.as_tensor(c, device=self.device).double() for c in counts])
        if distributed.largest(int(stop_requested())):
            raise StopRequestedError
        right, right5, fit, images_seen = distributed.sums(sums).tolist()
        if not images_seen:
            raise checks.value_error("data", "hold a test image that can be read", "none")
        return {
            "accuracy": 100 * right / images_seen,
            "accuracy_top5": 100 * right5 / images_seen,
            "loss": fit / images_seen,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights."""
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averaged weights back, and let the recipe's constants rule the optimiser.

        Raises:
            ValueError: the checkpoint and the recipe do not both have them, or lack them.
        """
        # What the checkpoint has of them is not looked at.
        for group, constants in zip(self.optimizer.param_groups, self._constants, strict=True):
            group.update(constants)
        if ("average" in state) != (self.average is not None):
            got = "a checkpoint with them" if "average" in state else "a checkpoint without them"
            raise checks.value_error("ema", "keep averaged weights as the resumed run did", got)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def start_from_file(task: ImageTask, path: str, accumulate: int) -> None:
    """Start from a plain network's file, with statistics of training images.

    The stream is where it was afterwards.

    Raises:
        ValueError: the file does not fit the network.
    """
    position = task.stream.state_dict()
    count = -(-ESTIMATION_IMAGES * accumulate // task.recipe.batch_size)
    batches = (task.stream.next()[0] for _ in range(count))
    start_from_plain(task.network, load_plain(path), batches)
    task.stream.load_state_dict(position)
    # Every process saw its own images.
    for buffer in task.network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(distributed.means(buffer))
