"""The list of layers: what is measured, by class; the GPU gate reads the same list.

The three networks come with every distinct layer once and how often the network has it. Their
batch is a property of the run (``DEFAULT_BATCH``); the layers of the other classes have their own.
"""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A convolution layer with square images and kernels.

    Attributes:
        n: batch.
        c: input channels.
        size: height and width of the input.
        o: filters.
        k: kernel size.
        stride: pixels.
        groups: channel groups.
        dilation: pixels between taps.
    """

    n: int
    c: int
    size: int
    o: int
    k: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def name(self) -> str:
        """The name typed after ``--layers``; a stride, group count or dilation of 1 is left out.

        Example:
            >>> Layer(8, 64, 56, 64, 3, stride=2, groups=64).name
            'n8-c64-h56-o64-k3-s2-g64'
        """
        parts = [f"n{self.n}", f"c{self.c}", f"h{self.size}", f"o{self.o}", f"k{self.k}"]
        for letter, value in (("s", self.stride), ("g", self.groups), ("d", self.dilation)):
            if value > 1:
                parts.append(f"{letter}{value}")
        return "-".join(parts)

    @property
    def padding(self) -> int:
        """Pixels on each side: odd kernels keep the size at stride 1, even ones take whole patches.

        Example:
            >>> Layer(1, 8, 8, 8, 3, dilation=2).padding, Layer(1, 3, 8, 8, 4, 4).padding
            (2, 0)
        """
        return self.dilation * (self.k // 2) if self.k % 2 else 0

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """[n, c, h, w]."""
        return self.n, self.c, self.size, self.size

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[o, c / groups, r, s]."""
        return self.o, self.c // self.groups, self.k, self.k

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """[n, o, p, q]."""
        out = (self.size + 2 * self.padding - self.dilation * (self.k - 1) - 1) // self.stride + 1
        return self.n, self.o, out, out

    @property
    def patch_size(self) -> int:
        """Elements of a patch, and of a filter."""
        return self.c // self.groups * self.k**2


class NetworkLayer(NamedTuple):
    """A layer and how many times its network has it."""

    layer: Layer
    times: int


#: Images a network's layers are measured with, by device type, where no batch is given.
DEFAULT_BATCH = {"cuda": 128, "cpu": 8}


def _layer(c: int, o: int, size: int, k: int, stride: int, times: int) -> NetworkLayer:
    return NetworkLayer(Layer(DEFAULT_BATCH["cuda"], c, size, o, k, stride), times)


#: The convolutions of three networks.
NETWORKS: dict[str, tuple[NetworkLayer, ...]] = {
    "resnet18": (
        _layer(3, 64, 224, 7, 2, 1),
        _layer(64, 64, 56, 3, 1, 4),
        _layer(64, 128, 56, 3, 2, 1),
        _layer(128, 128, 28, 3, 1, 3),
        _layer(64, 128, 56, 1, 2, 1),
        _layer(128, 256, 28, 3, 2, 1),
        _layer(256, 256, 14, 3, 1, 3),
        _layer(128, 256, 28, 1, 2, 1),
        _layer(256, 512, 14, 3, 2, 1),
        _layer(512, 512, 7, 3, 1, 3),
        _layer(256, 512, 14, 1, 2, 1),
    ),
    "resnet50": (
        _layer(3, 64, 224, 7, 2, 1),
        _layer(64, 64, 56, 1, 1, 1),
        _layer(64, 64, 56, 3, 1, 3),
        _layer(64, 256, 56, 1, 1, 4),
        _layer(256, 64, 56, 1, 1, 2),
        _layer(256, 128, 56, 1, 1, 1),
        _layer(128, 128, 56, 3, 2, 1),
        _layer(128, 128, 28, 3, 1, 3),
        _layer(128, 512, 28, 1, 1, 4),
        _layer(512, 128, 28, 1, 1, 3),
        _layer(256, 512, 56, 1, 2, 1),
        _layer(512, 256, 28, 1, 1, 1),
        _layer(256, 256, 28, 3, 2, 1),
        _layer(256, 256, 14, 3, 1, 5),
        _layer(256, 1024, 14, 1, 1, 6),
        _layer(1024, 256, 14, 1, 1, 5),
        _layer(512, 1024, 28, 1, 2, 1),
        _layer(1024, 512, 14, 1, 1, 1),
        _layer(512, 512, 14, 3, 2, 1),
        _layer(512, 512, 7, 3, 1, 2),
        _layer(512, 2048, 7, 1, 1, 3),
        _layer(2048, 512, 7, 1, 1, 2),
        _layer(1024, 2048, 14, 1, 2, 1),
    ),
    "cifar32": (
        _layer(3, 96, 32, 3, 1, 1),
        _layer(96, 96, 32, 3, 1, 10),
        _layer(96, 192, 32, 3, 2, 1),
        _layer(192, 192, 16, 3, 1, 9),
        _layer(192, 384, 16, 3, 2, 1),
        _layer(384, 384, 8, 3, 1, 9),
    ),
}

#: The rows that the CPU kernels' targets are stated for.
OPERATOR = "operator"

# Layers with a batch of their own.
_CLASSES: dict[str, tuple[Layer, ...]] = {
    OPERATOR: (
        Layer(8, 64, 56, 64, 3),
        Layer(8, 256, 56, 64, 1),
        Layer(8, 64, 56, 256, 1),
        Layer(64, 16, 32, 16, 3),
        Layer(64, 96, 32, 96, 3),
        Layer(64, 192, 16, 192, 3),
        Layer(64, 384, 8, 384, 3),
    ),
    "batch1": (
        Layer(1, 64, 56, 64, 3),
        Layer(1, 64, 56, 256, 1),
        Layer(1, 256, 14, 256, 3),
        Layer(1, 512, 7, 512, 3),
    ),
}

# Layers of other networks, measured with the run's batch: depthwise layers of MobileNet, ConvNeXt
# and EfficientNet, grouped ones of ResNeXt, dilated ones of segmentation heads, first layers.
_SHAPES: dict[str, tuple[Layer, ...]] = {
    "depthwise": (
        Layer(0, 96, 56, 96, 3, groups=96),
        Layer(0, 144, 56, 144, 3, 2, groups=144),
        Layer(0, 576, 14, 576, 5, groups=576),
        Layer(0, 96, 56, 96, 7, groups=96),
        Layer(0, 384, 14, 384, 7, groups=384),
    ),
    "grouped": (
        Layer(0, 128, 56, 128, 3, groups=32),
        Layer(0, 256, 28, 256, 3, groups=32),
        Layer(0, 64, 28, 128, 1, groups=4),
    ),
    "dilated": (
        Layer(0, 128, 28, 128, 3, dilation=2),
        Layer(0, 256, 14, 256, 3, dilation=4),
    ),
    "stem": (
        Layer(0, 3, 224, 64, 7, 2),
        Layer(0, 3, 224, 32, 3, 2),
        Layer(0, 3, 224, 96, 4, 4),
        Layer(0, 3, 32, 96, 3),
    ),
}

#: Names of the classes, in the order of the tables.
CLASSES: tuple[str, ...] = (*NETWORKS, *_SHAPES, *_CLASSES)


def layer_classes(batch: int) -> dict[str, tuple[Layer, ...]]:
    """Return the layers of every class; those without a batch of their own get ``batch``."""
    found = {name: tuple(e.layer for e in entries) for name, entries in NETWORKS.items()}
    found |= _SHAPES
    return {
        name: tuple(layer._replace(n=batch) for layer in layers) for name, layers in found.items()
    } | _CLASSES


def distinct_layers(batch: int = DEFAULT_BATCH["cuda"]) -> dict[str, tuple[Layer, list[str]]]:
    """Return every layer once, with the classes that have it, by name."""
    found: dict[str, tuple[Layer, list[str]]] = {}
    for name, layers in layer_classes(batch).items():
        for layer in layers:
            found.setdefault(layer.name, (layer, []))[1].append(name)
    return found


def times_in_network(network: str, layer: Layer) -> int:
    """Return how many convolutions of a network have a layer's shape, whatever the batch.

    Example:
        >>> times_in_network("resnet18", Layer(8, 64, 56, 64, 3))
        4
    """
    return sum(e.times for e in NETWORKS[network] if e.layer._replace(n=layer.n) == layer)
