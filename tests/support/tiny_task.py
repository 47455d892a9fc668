"""A training of seconds that draws on everything a checkpoint must hold, and a command for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv import DecoupledConv2d
from train.engine import distributed
from train.engine.config import EngineOptions, option, parse
from train.engine.loop import launch


class TinyStream:
    """Random images whose class is the brighter half, each rank its share of a common batch."""

    images_per_epoch = 64

    def __init__(self, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.share = slice(rank * batch_size, (rank + 1) * batch_size)
        self.total = batch_size * world_size

    def next(self) -> tuple[Tensor, Tensor]:
        images = torch.rand(self.total, 2, 6, 6, generator=self.generator)[self.share]
        labels = (images[..., :3].sum(dim=(1, 2, 3)) > images[..., 3:].sum(dim=(1, 2, 3))).long()
        return images, labels

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class TinyTask:
    """A decoupled layer, batch normalisation, dropout, Adam, a schedule and averaged weights."""

    forward_network: Callable[..., Any]

    def __init__(
        self, batch_size: int = 8, *, plain: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        norm = [] if plain else [nn.BatchNorm2d(4)]
        drop = [] if plain else [nn.Dropout(0.3)]
        layer = DecoupledConv2d(2, 4, 3, padding=1, magnitude="tanh", sync_norm=plain)
        self.network = nn.Sequential(
            layer, *norm, nn.ReLU(), nn.Flatten(), *drop, nn.Linear(4 * 6 * 6, 2)
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        self.stream = TinyStream(batch_size, rank, world_size)
        self.average = self.network[-1].weight.detach().clone()
        self.before: dict[int, Callable[[], None]] = {}
        self.steps: list[int] = []

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        entropy = F.cross_entropy(self.forward_network(images).float(), labels)
        penalty = self.network[-1].weight.square().mean()
        return entropy + 1e-3 * penalty, {"entropy": entropy, "penalty": penalty}

    def before_step(self, step: int) -> None:
        self.steps.append(step)
        if step in self.before:
            self.before[step]()
        self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)

    def after_step(self, step: int) -> None:
        self.average.lerp_(self.network[-1].weight.detach(), 0.1)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        stream = TinyStream(64)
        images, labels = stream.next()
        logits = self.network(images)
        right = float((logits.argmax(dim=1) == labels).double().mean())
        return {"accuracy": 100 * right, "loss": float(F.cross_entropy(logits, labels))}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.copy_(state["average"])


@dataclass(frozen=True, kw_only=True)
class TinyOptions(EngineOptions):
    """Options of the command; ``die_at`` kills rank 1 before that iteration of its first life."""

    batch_size: int = option(4, "images of one process per batch")
    die_at: int | None = option(None, "iteration before which rank 1 dies")


def main(arguments: list[str] | None = None) -> int:
    options = parse(TinyOptions, arguments, program="tiny_task.py", description="Train a bit.")

    def build(device: torch.device) -> TinyTask:
        task = TinyTask(
            options.batch_size,
            plain=True,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if options.die_at is not None and distributed.rank() == 1 and first_life:
            task.before[options.die_at] = lambda: os._exit(9)
        return task

    return launch(options, build, program="tiny_task.py", name="tiny")


if __name__ == "__main__":
    sys.exit(main())
