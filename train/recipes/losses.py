"""What training minimises: the fit of the labels, weight decay, and correlation of filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcconv import orthogonality_penalty
from dcconv.operator import checks


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Which terms the loss has.

    ``smoothing`` is the share of the target that all classes have alike. ``offset`` is added to
    the probabilities inside the logarithm: a confident mistake then costs at most -log(offset),
    9.21 officially, and moves nothing; 0 is the usual cross entropy. ``l2`` decays inside the loss
    what :func:`l2_tensors` returns; ``orthogonality`` is the coefficient of
    :func:`dcconv.orthogonality_penalty`. 0 leaves a term out.
    """

    smoothing: float = 0.0
    offset: float = 0.0
    l2: float = 0.0
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        for argument in ("smoothing", "offset", "l2", "orthogonality"):
            rule = "be a finite number of at least 0"
            checks.number(argument, getattr(self, argument), rule, 0.0, closed=True)
        if self.smoothing >= 1:
            raise checks.value_error("smoothing", "be below 1", self.smoothing)


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, offset: float = 0.0
) -> Tensor:
    """Return the mean over the batch of -sum t log(softmax + offset), t the smoothed labels.

    Args:
        logits: [n, classes], any floating dtype; computed in at least float32.
        labels: [n] int64.
        smoothing: t = (1 - smoothing) * one-hot + smoothing / classes.
        offset: see :class:`Loss`.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 100.0]]), torch.tensor([0]), offset=1e-4).item()
        9.2103...
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if offset == 0.0:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    surprise = -torch.log(torch.softmax(logits, dim=1) + offset)
    right = surprise.gather(1, labels[:, None]).squeeze(1)
    return ((1.0 - smoothing) * right + smoothing * surprise.mean(dim=1)).mean()


def l2_tensors(network: nn.Module) -> list[Tensor]:
    """Return what the official loss decays (spec 2.7): plain filters, and scales and offsets.

    Not decoupled filters, radii, PReLU's slopes and the offsets of a linear layer.
    """
    tensors: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            tensors.append(module.weight)
        elif isinstance(module, _BatchNorm) and module.affine:
            tensors += [module.weight, module.bias]
    return tensors


def l2_penalty(network: nn.Module, coefficient: float) -> Tensor:
    """Return coefficient / 2 times the sum of squares of :func:`l2_tensors`."""
    flat = [tensor.flatten().float() for tensor in l2_tensors(network)]
    return 0.5 * coefficient * torch.cat(flat).square().sum()


def loss_terms(network: nn.Module, logits: Tensor, labels: Tensor, loss: Loss) -> dict[str, Tensor]:
    """Return the terms ``fit``, ``l2`` and ``orthogonality``, as far as the loss has them.

    Training minimises :func:`total` of them. Mixed precision ends here: all terms have at least
    float32, whatever autocast is on.

    Args:
        network: the network itself, without wrappers.
        logits: its outputs [n, classes].
        labels: [n] int64.
        loss: which terms.
    """
    with torch.autocast(logits.device.type, enabled=False):
        terms = {"fit": cross_entropy(logits, labels, loss.smoothing, loss.offset)}
        if loss.l2:
            terms["l2"] = l2_penalty(network, loss.l2)
        if loss.orthogonality:
            terms["orthogonality"] = orthogonality_penalty(network, loss.orthogonality)
    return terms


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of the terms."""
    return torch.stack(list(terms.values())).sum()
