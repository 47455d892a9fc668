"""The convolutions of three networks: what a training step on a GPU is made of.

Every distinct layer once, with how often the network has it. 128 images; the stem's 7x7 and the
strided layers have padding k // 2, as everywhere in these networks.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.cases import Layer

IMAGES = 128


class NetworkLayer(NamedTuple):
    """A layer and how many times its network has it."""

    layer: Layer
    times: int


def _layer(c: int, o: int, size: int, k: int, stride: int, times: int) -> NetworkLayer:
    return NetworkLayer(Layer(IMAGES, c, size, o, k, stride), times)


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


def distinct_layers() -> dict[str, tuple[Layer, list[str]]]:
    """Return every layer of the three networks once, with the networks that have it, by name."""
    found: dict[str, tuple[Layer, list[str]]] = {}
    for network, layers in NETWORKS.items():
        for entry in layers:
            found.setdefault(entry.layer.name, (entry.layer, []))[1].append(network)
    return found
