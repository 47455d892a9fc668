"""FGSM, BIM and PGD: images moved within a bound so that a network errs.

They are written here because no library fits. foolbox 3.3.4 and adversarial-robustness-toolbox
1.20.1 call ``backward`` and so leave gradients on the parameters that adversarial training is
about to step, and the latter passes every batch through NumPy. torchattacks 3.5.1 has no restarts
in its PGD, pins requests to 2.25, and installs a second top-level package, ``robustbench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv.operator import checks

#: Every attack by its name, with what it is called in a table.
labels = {"fgsm": "FGSM", "bim": "BIM", "pgd": "PGD"}


@dataclass(frozen=True)
class Attack:
    """Signed gradient steps on the cross entropy, projected to the bound after each.

    Args:
        epsilon: largest change of a pixel, pixels going from 0 to 1.
        step_size: change of a pixel in one step.
        steps: number of steps.
        restarts: random starts, of which the worst for the network counts, image by image, and
            no more than it takes to make it err; 0 starts once, at the image itself.
    """

    epsilon: float
    step_size: float
    steps: int
    restarts: int = 0

    def __post_init__(self) -> None:
        for argument in ("epsilon", "step_size"):
            rule = "be a finite number of at least 0"
            checks.number(argument, getattr(self, argument), rule, 0.0, closed=True)
        checks.integer("steps", self.steps, 1)
        checks.integer("restarts", self.restarts, 0)


def fgsm(epsilon: float) -> Attack:
    """Return the fast gradient sign method: one step to the bound."""
    return Attack(epsilon, epsilon, 1)


@contextmanager
def attackable(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, its parameters held fixed, and back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    free = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def perturb(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images within the attack's bound, and within 0 and 1, on which the network errs more.

    The network is attacked in evaluation mode; its mode, its parameters and their gradients are
    the same afterwards.

    Args:
        network: from pixels, not normalised ones, to logits [n, classes].
        images: [n, c, h, w] from 0 to 1.
        classes: [n], the right ones.
        attack: how.
        generator: of random starts; None for PyTorch's global one.

    Raises:
        ValueError: images have pixels below 0 or above 1.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = network[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> perturb(network, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), fgsm(0.25)).item()
        0.25
    """
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise checks.value_error("images", "have pixels from 0 to 1", f"{low:g} to {high:g}")
    with attackable(network), torch.enable_grad():
        if not attack.restarts:
            return _ascend(network, images, classes, attack, images)
        worst = _ascend(network, images, classes, attack, _start(images, attack, generator))
        for _ in range(1, attack.restarts):
            most = margins(network, worst, classes)
            # What errs already cannot become worse; the rest is drawn and attacked anew.
            left = (most <= 0).nonzero().squeeze(1)
            if not len(left):
                break
            start = _start(images[left], attack, generator)
            found = _ascend(network, images[left], classes[left], attack, start)
            better = margins(network, found, classes[left]) > most[left]
            worst[left[better]] = found[better]
        return worst


@torch.no_grad()
def margins(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return by how much the largest wrong logit exceeds the right one [n]: above 0, an error."""
    logits: Tensor = network(images).float()
    right = F.one_hot(classes, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(dim=1) - logits[right]


def _start(images: Tensor, attack: Attack, generator: torch.Generator | None) -> Tensor:
    """Return a point drawn evenly from the bound, cut to the range of pixels."""
    device = images.device if generator is None else generator.device
    share = torch.rand(images.shape, generator=generator, device=device).to(images.device)
    return (images + (2.0 * share - 1.0) * attack.epsilon).clamp(0.0, 1.0)


def _ascend(
    network: nn.Module, images: Tensor, classes: Tensor, attack: Attack, start: Tensor
) -> Tensor:
    lower = (images - attack.epsilon).clamp(min=0.0)
    upper = (images + attack.epsilon).clamp(max=1.0)
    x = start
    for _ in range(attack.steps):
        x = x.detach().requires_grad_()
        # A sum, so that the gradient of an image does not shrink with the batch.
        loss = F.cross_entropy(network(x).float(), classes, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        moved = x.detach() + attack.step_size * gradient.sign()
        x = torch.minimum(torch.maximum(moved, lower), upper)
    return x
