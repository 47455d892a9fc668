"""The networks of a robustness run and their training, natural or adversarial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv.operator import checks
from train.data.augment import Augment
from train.data.cifar import Cifar
from train.data.digits import CLASSES, IMAGE_SIZE, DigitsStream, Split, load_split
from train.data.stream import Stream, TensorStream
from train.networks import build_network, find_operator, small_network, start_statistics
from train.recipes.schedules import make_optimizer, set_step
from train.robustness.attacks import Attack, perturb
from train.robustness.options import RobustnessRun
from train.task import share_of_batch

# Pixels of CIFAR from 0 to 255 come out as integers; the networks see them from 0 to 1.
TO_SHARE = Augment(mean=(0.0,), std=(255.0,))


class Normalise(nn.Module):
    """Pixels from 0 to 1 as the official CIFAR code has them: (255 x - 127.5) / 128.

    It is part of the network, so that bounds hold for pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (255.0 * x - 127.5) / 128.0


@dataclass(frozen=True)
class Problem:
    """Images to train on and to attack, and the network for them, all on one device.

    ``stream`` takes a seed and ``build`` an operator's name; ``images`` are from 0 to 1. ``first``
    holds training images that statistics start from.
    """

    stream: Callable[[int], Stream]
    build: Callable[[str], nn.Module]
    images: Tensor
    classes: Tensor
    first: Tensor


def digits_problem(options: RobustnessRun, seed: int, device: torch.device) -> Problem:
    """Return the digits, split by the seed."""
    share = share_of_batch(options.batch_size, options.accumulate)
    split = Split(*(part.to(device) for part in load_split(seed, options.test_share)))
    if options.batch_size > len(split.train_images):
        rule = f"be at most the number of training images, {len(split.train_images)}"
        raise checks.value_error("batch_size", rule, options.batch_size)

    def build(operator: str) -> nn.Module:
        return small_network(find_operator(operator), IMAGE_SIZE, CLASSES).to(device)

    return Problem(
        lambda seed: DigitsStream(split, share, seed, options.shift),
        build,
        split.test_images,
        split.test_classes,
        split.train_images[: options.batch_size],
    )


def cifar_problem(options: RobustnessRun, data: Cifar, device: torch.device) -> Problem:
    """Return CIFAR-10, padded, cropped and flipped as in the official training."""
    share = share_of_batch(options.batch_size, options.accumulate)

    def stream(seed: int) -> Stream:
        return TensorStream(
            data.train_images,
            data.train_labels,
            batch_size=share,
            seed=seed,
            augment=TO_SHARE,
            device=device,
        )

    def build(operator: str) -> nn.Module:
        network = build_network(options.network, operator, data.classes)
        return nn.Sequential(Normalise(), network).to(device)

    first = data.train_images[: options.batch_size].to(device)
    return Problem(
        stream,
        build,
        TO_SHARE.normalise(data.test_images.to(device)),
        data.test_labels.to(device),
        TO_SHARE.normalise(first),
    )


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, classes: Tensor, batch_size: int) -> float:
    """Return the share of images that a network in evaluation mode names right, in %.

    Raises:
        ValueError: a logit is not finite.
    """
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    fine = torch.ones((), dtype=torch.bool, device=images.device)
    for part, names in zip(images.split(batch_size), classes.split(batch_size), strict=True):
        logits = network(part)
        fine &= logits.isfinite().all()
        right += (logits.argmax(dim=1) == names).sum()
    if not bool(fine):
        raise checks.value_error("logits", "be finite", "NaN or infinity")
    return 100.0 * int(right) / len(images)


class RobustTask:
    """One training: the cross entropy on images, and on images attacked in the network's own state.

    Clean and adversarial images go through the network as one batch.

    Args:
        options: of the run.
        problem: what to train on.
        operator: what the convolutions are.
        seed: of order and augmentation; the weights are drawn from the global generator.
        attack: of adversarial training, None for natural training.
    """

    forward_network: Callable[..., Any]

    def __init__(
        self,
        options: RobustnessRun,
        problem: Problem,
        operator: str,
        seed: int,
        attack: Attack | None,
    ) -> None:
        self.options = options
        self.problem = problem
        self.attack = attack
        self.network = problem.build(operator)
        self.forward_network = self.network
        self.stream = problem.stream(seed)
        self.recipe, self.schedule = options.recipe()
        self.optimizer = make_optimizer(self.network, self.recipe)
        start_statistics(self.network, problem.first)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its parts in adversarial training."""
        if self.attack is None:
            return F.cross_entropy(self.forward_network(images).float(), labels), {}
        adversarial = perturb(self.network, images, labels, self.attack)
        share = self.options.adversarial_share
        if share == 1:
            return F.cross_entropy(self.forward_network(adversarial).float(), labels), {}
        logits = self.forward_network(torch.cat((images, adversarial))).float()
        clean, attacked = (F.cross_entropy(part, labels) for part in logits.chunk(2))
        terms = {"clean": clean, "adversarial": attacked}
        return (1.0 - share) * clean + share * attacked, terms

    def before_step(self, step: int) -> None:
        """Set the learning rate."""
        set_step(self.optimizer, self.recipe, self.schedule, step, self.options.steps)

    def after_step(self, step: int) -> None:
        """Do nothing: the filters are not projected."""

    def evaluate(self) -> dict[str, float]:
        """Return the accuracy (%) on the test images, not attacked."""
        problem = self.problem
        self.network.eval()
        batch = self.options.attack_batch
        return {"accuracy": accuracy(self.network, problem.images, problem.classes, batch)}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the network, its optimiser and its stream are all there is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""
