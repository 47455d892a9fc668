"""Draw the features of handwritten digits in the plane, for every operator (the paper's Figure 1).

``python -m train.features`` trains the network with two features on scikit-learn's digits and
draws where it puts the test images, coloured by class, with the direction of every class's
weights: plain convolution tells classes apart by angle with norms as they come, the operators of
bounded magnitude keep every feature within a square.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from dcconv import DecoupledConv2d
from dcconv.operator.checks import number, value_error
from train.data.digits import CLASSES, IMAGE_SIZE, load_split
from train.digits import Config, Run, launch
from train.engine.checkpoint import Checkpoints
from train.engine.config import option, parse
from train.engine.state import check_state
from train.networks import Features2d, find_operator

PANEL = "features.png"

# Okabe and Ito's colours, the yellow darker so that it shows on white, and two more.
_COLOURS = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#B5A300"),
    *("#0072B2", "#D55E00", "#CC79A7", "#8A8A8A", "#7B2FBE"),
)
_MARKERS = "osD^vP*X<>"


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Config):
    """Everything a run is made of."""

    full: ClassVar[Mapping[str, Any]] = {"epochs": 40, "seeds": (0,)}
    short: ClassVar[Mapping[str, Any]] = {"epochs": 5, "seeds": (0,)}

    operators: tuple[str, ...] = option(
        ("conv", "sphere_cosine", "ball_cosine", "tanh_cosine"),
        "what to convolve with; a wrong name shows what there is",
    )
    epochs: int = option(None, "rounds through the training images (default: 40, quick 5)")
    seeds: tuple[int, ...] = option(None, "one training for each (default: 0)")
    # Features within a square give certain answers only where the weights are long.
    classifier_lr: float = option(0.1, "largest learning rate of the classifier")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("classifier_lr", self.classifier_lr, "be a finite number above 0", 0.0)


class Plane(NamedTuple):
    """The test images of one training in the plane.

    Features are [n, 2], classes [n], the classifier's weights [classes, 2], the accuracy in %.
    ``bound`` is the largest magnitude of a feature, None where there is no such bound.
    """

    operator: str
    seed: int
    features: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    accuracy: float
    bound: float | None


def bound_of(layer: nn.Module) -> float | None:
    """Return what no output of a layer exceeds in magnitude, None where there is no bound."""
    if not isinstance(layer, DecoupledConv2d) or layer.weighting != "none":
        return None
    return layer.alpha if layer.magnitude in ("sphere", "ball", "tanh") else None


@torch.no_grad()
def plane_of(
    network: Features2d, operator: str, seed: int, images: torch.Tensor, classes: torch.Tensor
) -> Plane:
    """Return where a trained network puts images [n, 1, h, w] of known classes [n]."""
    network.eval()
    features = network.features(images)
    right = network.classifier(features).argmax(dim=1) == classes
    return Plane(
        operator,
        seed,
        features.numpy(),
        classes.numpy(),
        network.classifier.weight.numpy(),
        100.0 * float(right.double().mean()),
        bound_of(network.to_plane),
    )


def _draw(axes: Axes, plane: Plane) -> None:
    x, y = plane.features.T
    radius = float(np.hypot(x, y).max())
    # Weights of zero have no direction, and features of zero no extent.
    radius = radius if radius > 0 else 1.0
    for kind in range(len(plane.weights)):
        colour = _COLOURS[kind % len(_COLOURS)]
        mine = plane.classes == kind
        direction = plane.weights[kind] / max(float(np.hypot(*plane.weights[kind])), 1e-12)
        end = 1.06 * radius * direction
        axes.plot((0, end[0]), (0, end[1]), color=colour, linewidth=1.1, alpha=0.75, zorder=1)
        axes.scatter(
            x[mine],
            y[mine],
            s=11,
            color=colour,
            marker=_MARKERS[kind % len(_MARKERS)],
            alpha=0.7,
            linewidths=0,
            label=str(kind),
            zorder=2,
        )
        axes.annotate(
            str(kind),
            1.15 * radius * direction,
            color=colour,
            ha="center",
            va="center",
            fontweight="bold",
            zorder=3,
        )
    if plane.bound is not None:
        corner, side = -plane.bound, 2 * plane.bound
        box = mpl.patches.Rectangle(
            (corner, corner), side, side, fill=False, color="#666666", linestyle="--", zorder=0
        )
        axes.add_patch(box)
    limit = 1.25 * max(radius, plane.bound or 0.0)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set_axisbelow(True)
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_title(
        f"{find_operator(plane.operator).label}: {plane.accuracy:.1f} % of test images right",
        fontsize=10.5,
    )
    axes.set_xlabel("first feature")
    axes.set_ylabel("second feature")


def figure_of(planes: Sequence[Plane], columns: int) -> Figure:
    """Draw planes row by row; every test image is a point, every class a colour."""
    rows = -(-len(planes) // columns)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * columns, 4.7 * rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, plane in zip(grid, planes, strict=False):
            _draw(axes, plane)
        for axes in grid[len(planes) :]:
            axes.set_axis_off()
        legend = "digit; lines: directions of the classifier's weights"
        if any(plane.bound is not None for plane in planes):
            legend += "\ndashed square: bound of the features"
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=5 if columns == 1 else CLASSES,
            frameon=False,
            title=legend,
            markerscale=1.6,
            columnspacing=1.2,
            handletextpad=0.2,
        )
    return figure


def draw(planes: Sequence[Plane], columns: int) -> bytes:
    """Draw planes row by row, as a PNG."""
    file = io.BytesIO()
    figure_of(planes, columns).savefig(file, format="png", dpi=80)
    return file.getvalue()


class FeatureRun(Run):
    """One run: trains every operator with every seed and draws their features."""

    program: ClassVar[str] = "python -m train.features"
    name: ClassVar[str] = "features"

    def __init__(self, config: FeatureConfig, console: Console) -> None:
        super().__init__(config, console)
        self.classifier_lr = config.classifier_lr

    def network(self, operator: str) -> Features2d:
        """Return an untrained network with two features."""
        network = Features2d(find_operator(operator), IMAGE_SIZE, CLASSES, self.config.widths)
        for module in network.modules():
            if isinstance(module, DecoupledConv2d):
                module.norm_momentum = self.config.norm_momentum
        return network

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Return the classifier apart from the rest."""
        assert isinstance(network, Features2d)
        classifier = list(network.classifier.parameters())
        rest = [p for module in (network.body, network.to_plane) for p in module.parameters()]
        return [
            {"params": rest, "lr": self.config.lr},
            {"params": classifier, "lr": self.classifier_lr},
        ]

    def plane(self, operator: str, seed: int) -> Plane:
        """Return the features of a finished training, by its last checkpoint."""
        path = self.training(operator, seed) / "checkpoints"
        found = Checkpoints(path, warn=self.console.print, check=check_state).load_latest()
        if found is None:
            raise value_error("training", "have a checkpoint", repr(str(path)))
        network = self.network(operator)
        network.load_state_dict(found[1]["network"])
        split = load_split(seed, self.config.test_share)
        return plane_of(network, operator, seed, split.test_images, split.test_classes)

    def draw(self) -> None:
        """Draw the curves, every training's plane, and all planes: operators across, seeds down."""
        super().draw()
        rows = self.rows.values()
        planes = [self.plane(row.operator, seed) for row in rows for seed in row.seeds]
        for plane in planes:
            self.folder.write(f"{plane.operator}_seed{plane.seed}.png", draw([plane], 1))
        seeds = max(len(row.seeds) for row in rows)
        if seeds == 1:
            self.folder.write(PANEL, draw(planes, min(len(planes), 2)))
        else:
            # An operator that an interruption left short comes last, so no row breaks.
            ordered = sorted(planes, key=lambda plane: self.config.seeds.index(plane.seed))
            self.folder.write(PANEL, draw(ordered, len(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m train.features`` and return its exit status."""
    config = parse(
        FeatureConfig,
        arguments,
        program=FeatureRun.program,
        description="Draw the features of handwritten digits in the plane, for every operator.",
        describe=FeatureConfig.describe,
    )
    return launch(FeatureRun, config)


if __name__ == "__main__":
    sys.exit(main())
