"""Learning rates by iteration, and the optimisers they drive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcconv.operator import checks

_FINITE = "be a finite number of at least 0"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate's factor, by iteration counted from 0.

    ``steps`` multiplies by ``factor`` from each iteration of ``drops`` on. ``cosine`` falls to
    ``floor`` at the last iteration. Both rise linearly over the first ``warmup`` iterations.
    """

    kind: str = "steps"
    drops: tuple[int, ...] = ()
    factor: float = 0.1
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("schedule", self.kind, ("steps", "cosine"))
        checks.integer("warmup", self.warmup, 0)
        checks.number("factor", self.factor, "be a finite number above 0", 0.0)
        checks.number("floor", self.floor, _FINITE, 0.0, closed=True)
        for drop in self.drops:
            checks.integer("drops", drop, 1)
        if list(self.drops) != sorted(set(self.drops)):
            raise checks.value_error("drops", "rise", self.drops)

    def at(self, step: int, steps: int) -> float:
        """Return the factor at an iteration of a training of so many."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "steps":
            return self.factor ** sum(step >= drop for drop in self.drops)
        done = (step - self.warmup) / max(steps - 1 - self.warmup, 1)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.floor + (1.0 - self.floor) * cosine

    def scaled(self, share: float) -> Schedule:
        """Return the schedule of a training that is shorter or longer by a factor."""
        drops = sorted({max(round(drop * share), 1) for drop in self.drops})
        return Schedule(
            kind=self.kind,
            drops=tuple(drops),
            factor=self.factor,
            warmup=round(self.warmup * share),
            floor=self.floor,
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimiser and its constants.

    ``kind`` is ``adam``, ``adamw`` or ``sgd``. ``weight_decay`` acts on plain filters alone, see
    :func:`parameter_groups`. ``tensorflow_eps`` adds Adam's eps where TensorFlow does, to the
    uncorrected root; it differs in the first iterations only.
    """

    kind: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    tensorflow_eps: bool = False
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("optimizer", self.kind, ("adam", "adamw", "sgd"))
        checks.number("lr", self.lr, "be a finite number above 0", 0.0)
        for argument in ("eps", "momentum", "weight_decay"):
            checks.number(argument, getattr(self, argument), _FINITE, 0.0, closed=True)
        if len(self.betas) != 2:
            raise checks.value_error("betas", "be two numbers", self.betas)
        for beta in (*self.betas, self.momentum):
            if not 0 <= beta < 1:
                raise checks.value_error("betas and momentum", "be in [0, 1)", beta)
        if self.nesterov and not self.momentum:
            raise checks.value_error("momentum", "be above 0 with nesterov", self.momentum)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return what decays, the filters of plain convolutions and linear layers, and the rest.

    Decoupled filters do not decay: most operators are blind to their norm. Nor do scales, offsets,
    radii and slopes. Groups keep the order of ``network.parameters()``.
    """
    decaying = {
        module.weight for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p in decaying], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(network: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    """Build the optimiser of a network; :func:`set_step` must run before each of its steps."""
    groups = parameter_groups(network, optimizer.weight_decay)
    if optimizer.kind == "sgd":
        return torch.optim.SGD(
            groups, lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov
        )
    make = torch.optim.Adam if optimizer.kind == "adam" else torch.optim.AdamW
    return make(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)


def lr_at(optimizer: Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Return the learning rate of an iteration, counted from 0, in a training of so many."""
    return optimizer.lr * schedule.at(step, steps)


def set_step(
    built: torch.optim.Optimizer, optimizer: Optimizer, schedule: Schedule, step: int, steps: int
) -> float:
    """Set an optimiser up for an iteration, counted from 0; return its learning rate."""
    lr = lr_at(optimizer, schedule, step, steps)
    for group in built.param_groups:
        group["lr"] = lr
        if optimizer.tensorflow_eps:
            # PyTorch divides by sqrt(v / (1 - beta2^t)) + eps, TensorFlow's lr_t by sqrt(v) + eps.
            group["eps"] = optimizer.eps / math.sqrt(1.0 - optimizer.betas[1] ** (step + 1))
    return lr
