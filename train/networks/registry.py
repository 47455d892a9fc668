"""The networks for colour images, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dcconv.operator.checks import choice, integer, value_error
from train.networks.cnn9 import CNN9
from train.networks.operators import Operator, find_operator
from train.networks.resnet18 import ModifiedResNet18, ResNet18
from train.networks.resnet32 import ResNet32


@dataclass(frozen=True)
class Kind:
    """A network's class, how many widths it takes, and which options it has beside the common."""

    make: Callable[..., nn.Module]
    widths: int
    options: tuple[str, ...] = field(default=())


#: Every network for colour images by its name.
networks: dict[str, Kind] = {
    "resnet32": Kind(ResNet32, 3),
    "cnn9": Kind(CNN9, 3, ("image_size",)),
    "modified_resnet18": Kind(ModifiedResNet18, 4, ("block4",)),
    "resnet18": Kind(ResNet18, 4),
}


def build_network(
    name: str,
    operator: Operator | str,
    classes: int,
    *,
    norm: bool = True,
    official: bool = False,
    sync_norm: bool = False,
    widths: Sequence[int] | None = None,
    block4: bool | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build an untrained network from [n, 3, h, w] to [n, classes].

    Args:
        name: a key of ``networks``.
        operator: what its convolutions are; ``conv`` makes the plain baseline.
        classes: number of outputs.
        norm: with batch normalisation.
        official: the official code's moving averages, see :class:`train.networks.layers.Layers`.
        sync_norm: average the mean patch norm over the ranks.
        widths: channels of the stages; None takes the paper's.
        block4: of ``modified_resnet18`` only.
        image_size: of ``cnn9`` only.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = build_network("resnet32", "conv", 100)
        >>> sum(p.numel() for p in network.parameters())
        16736736
    """
    choice("network", name, networks)
    integer("classes", classes, 1)
    kind = networks[name]
    options: dict[str, Any] = {"norm": norm, "official": official, "sync_norm": sync_norm}
    if widths is not None:
        for width in widths:
            integer("widths", width, 1)
        if len(widths) != kind.widths:
            rule = f"be {kind.widths} numbers for network '{name}'"
            raise value_error("widths", rule, tuple(widths))
        options["widths"] = tuple(widths)
    for option, value in (("block4", block4), ("image_size", image_size)):
        if value is None:
            continue
        if option not in kind.options:
            raise value_error(option, f"be left out for network '{name}'", value)
        options[option] = value
    if isinstance(operator, str):
        operator = find_operator(operator)
    return kind.make(operator, classes, **options)
