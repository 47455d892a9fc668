"""What a network convolves with, by name: plain convolution or a decoupled operator."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from dcconv import DecoupledConv2d
from dcconv.operator.checks import type_error, value_error
from dcconv.operator.functions import angulars, magnitudes, weightings
from train.networks.plain import PlainConv2d

_NO_ACTIVATION = "_no_activation"

# mix adds alpha * b and beta * log(1 + b) with equal shares; elsewhere the layer's own default.
_BETA = {"mix": 1.0}


@dataclass(frozen=True)
class Operator:
    """What a network uses as its convolution, and whether an activation follows its normalisation.

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

    @property
    def projectable(self) -> bool:
        """Whether filters may be projected: a weighted operator's magnitude depends on them."""
        return self.magnitude is not None and self.weighting == "none"

    def conv2d(
        self,
        channels: int,
        filters: int,
        norm_momentum: float = 0.1,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: int | str = "same",
        norm_init: str = "first",
        sync_norm: bool = False,
    ) -> nn.Module:
        """Return a convolution without bias; for ``nn.Conv2d``, ``same`` needs stride 1."""
        if self.magnitude is None:
            if isinstance(padding, str):
                return nn.Conv2d(channels, filters, kernel, stride, padding, bias=False)
            return PlainConv2d(channels, filters, kernel, stride, padding)
        return DecoupledConv2d(
            channels,
            filters,
            kernel,
            stride,
            padding,
            magnitude=self.magnitude,
            angular=self.angular,
            weighting=self.weighting,
            beta=_BETA.get(self.magnitude, 0.5),
            norm_momentum=norm_momentum,
            norm_init=norm_init,
            sync_norm=sync_norm,
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
