"""Operator names and the small network that is trained with each of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from dcconv import DecoupledConv2d
from dcconv.checks import type_error, value_error
from dcconv.functions import angulars, magnitudes, weightings

_NO_ACTIVATION = "_no_activation"


@dataclass(frozen=True)
class Operator:
    """What a network uses as its convolution, and whether ReLU follows its normalisation.

    ``magnitude`` None means ``nn.Conv2d``.
    """

    name: str
    magnitude: str | None = None
    angular: str = "cosine"
    weighting: str = "none"
    activation: bool = True

    @property
    def label(self) -> str:
        """The name as shown in a figure."""
        text = "nn.Conv2d" if self.magnitude is None else f"{self.magnitude} x {self.angular}"
        text = text.replace("_", " ") if self.magnitude else text
        if self.weighting != "none":
            text += f", {self.weighting} weighting"
        return text if self.activation else text + ", no activation"

    def conv2d(self, channels: int, filters: int, norm_momentum: float) -> nn.Module:
        """Return a 3 x 3 convolution that keeps the image size."""
        if self.magnitude is None:
            return nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        return DecoupledConv2d(
            channels,
            filters,
            3,
            padding=1,
            magnitude=self.magnitude,
            angular=self.angular,
            weighting=self.weighting,
            norm_momentum=norm_momentum,
        )


def _known() -> dict[str, Operator]:
    bases = [Operator("conv")]
    for weighting in weightings.values():
        for magnitude in magnitudes:
            if weighting.only_with not in (None, magnitude):
                continue
            for angular in angulars:
                name = f"{magnitude}_{angular}"
                if weighting.name != "none":
                    name += f"_{weighting.name}_weighting"
                bases.append(Operator(name, magnitude, angular, weighting.name))
    plain = [
        Operator(b.name + _NO_ACTIVATION, b.magnitude, b.angular, b.weighting, activation=False)
        for b in bases
    ]
    return {operator.name: operator for operator in (*bases, *plain)}


#: Every operator by its name.
operators: dict[str, Operator] = _known()


def find_operator(name: object) -> Operator:
    """Return the operator of a name.

    Raises:
        TypeError, ValueError: the name is no known one; the message says what names there are.

    Example:
        >>> find_operator("linear_square_cosine_no_activation").angular
        'square_cosine'
    """
    if isinstance(name, str) and name in operators:
        return operators[name]
    weighted = [weighting for weighting in weightings if weighting != "none"]
    rule = (
        "be conv or <magnitude>_<angular>, then _<weighting>_weighting and _no_activation where "
        f"wanted (magnitude: {', '.join(magnitudes)}; angular: {', '.join(angulars)}; "
        f"weighting: {', '.join(weighted)}, the last two with tanh only)"
    )
    if not isinstance(name, str):
        raise type_error("operators", rule, type(name).__name__)
    close = difflib.get_close_matches(name, operators, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise value_error("operators", rule, repr(name) + hint)


def small_network(
    operator: Operator,
    image_size: int,
    classes: int,
    widths: Sequence[int] = (32, 64, 64),
    norm_momentum: float = 0.1,
) -> nn.Sequential:
    """Build the network for small grey images: 3 x 3 convolutions, then a linear classifier.

    Every convolution is the operator's, followed by batch normalisation and, unless the operator
    goes without, ReLU; 2 x 2 maximum pooling follows every convolution but the first.

    Args:
        operator: what the convolutions are; the rest is the same for all.
        image_size: rows and columns of the input, pixels.
        classes: number of outputs.
        widths: number of filters of each convolution.
        norm_momentum: of the decoupled layers' mean patch norm.

    Returns:
        A network from [n, 1, image_size, image_size] to [n, classes].

    Example:
        >>> import torch
        >>> network = small_network(find_operator("ball_cosine"), 8, 10)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    for index, (channels, filters) in enumerate(pairwise((1, *widths))):
        layers += [operator.conv2d(channels, filters, norm_momentum), nn.BatchNorm2d(filters)]
        if operator.activation:
            layers.append(nn.ReLU())
        if index:
            layers.append(nn.MaxPool2d(2))
            image_size //= 2
    layers += [nn.Flatten(), nn.Linear(widths[-1] * image_size**2, classes)]
    return nn.Sequential(*layers)


@torch.no_grad()
def start_statistics(network: nn.Module, images: Tensor) -> None:
    """Start every moving average of a network from one batch instead of from a constant.

    Batch normalisation starts its running variance at 1. The outputs of bounded operators vary
    far less, and evaluation would stay off by that factor until the average has forgotten the 1.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
