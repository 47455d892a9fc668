"""Networks by the name of their operator, plain convolution included."""

from train.networks.cnn9 import CNN9
from train.networks.features2d import Features2d
from train.networks.operators import Operator, find_operator, operators
from train.networks.registry import build_network, networks
from train.networks.resnet18 import ModifiedResNet18, ResNet18
from train.networks.resnet32 import ResNet32
from train.networks.small import small_network
from train.networks.statistics import estimate_statistics, start_statistics

__all__ = [
    "CNN9",
    "Features2d",
    "ModifiedResNet18",
    "Operator",
    "ResNet18",
    "ResNet32",
    "build_network",
    "estimate_statistics",
    "find_operator",
    "networks",
    "operators",
    "small_network",
    "start_statistics",
]
