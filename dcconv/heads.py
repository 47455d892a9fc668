"""Layers of a plain network that a decoupled operator should not take over unasked.

A bounded operator's output ends at alpha. Where that output is a logit, a box or what a sigmoid
turns into a gate, the network can no longer say what it has to. Such layers are told by their
place among their neighbours and by names, without running the network, so what a forward does in
code of its own (a functional sigmoid, a head used in the middle) is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import nn

LAST = "the last layer"
GATE = "a gate"
HEAD = "a head"

_SIGMOID = re.compile("sigmoid", re.IGNORECASE)
_NORM = re.compile("norm", re.IGNORECASE)
_SHAPE = re.compile("Upsampl|Pool|Flatten|Softmax|Shuffle|Dropout")
_SQUEEZE = re.compile(r"squeeze.?(and)?.?excit|^(effective)?se(module|layer|block|unit)?$", re.I)
_HEAD_CLASS = re.compile(r"(Head|Classifier|Predictor|Detect|Segment)\w{0,2}$")
_HEAD_NAME = re.compile(
    r"(\w*_)?(heads?|classifiers?|logits?|pred(ict(or|ions?)?)?|scores?|cls|bbox|box|outc|output"
    r"|outconv|final|anchors?)(_\w*)?"
)


def _is_one_by_one(conv: nn.Conv2d) -> bool:
    return tuple(conv.kernel_size) == (1, 1)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what computes, in the order of registration; an Identity does not."""
    for part in module.modules():
        if not isinstance(part, nn.Identity) and not any(True for _ in part.children()):
            yield part


def _learns_or_normalises(leaf: nn.Module) -> bool:
    own = any(True for _ in leaf.parameters(recurse=False))
    return own or _NORM.search(type(leaf).__name__) is not None


def _last(network: nn.Module) -> nn.Module | None:
    """Return the last layer with parameters, unless it is followed by a norm."""
    return next(
        (leaf for leaf in reversed(list(_leaves(network))) if _learns_or_normalises(leaf)), None
    )


def _gates(parent: nn.Module) -> Iterator[nn.Module]:
    """Yield the convolutions among a module's children that make a gate."""
    children = [child for child in parent.children() if not isinstance(child, nn.Identity)]
    convs = [child for child in children if isinstance(child, nn.Conv2d)]
    has_sigmoid = any(_SIGMOID.search(type(child).__name__) for child in children)
    if convs and has_sigmoid and all(map(_is_one_by_one, convs)):
        yield from convs
    for conv, following in pairwise(children):
        if isinstance(conv, nn.Conv2d) and _SIGMOID.search(type(following).__name__):
            yield conv
    if _SQUEEZE.search(type(parent).__name__):
        yield from (p for p in parent.modules() if isinstance(p, nn.Conv2d) and _is_one_by_one(p))


def _ends(parent: nn.Module, child: nn.Module) -> bool:
    """Whether no norm and no activation follows a child: it is an output, not a hidden layer."""
    if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        return True
    children = [part for part in parent.children() if not isinstance(part, nn.Identity)]
    following = children[children.index(child) + 1 :]
    if not following:
        return True
    kind = type(following[0]).__name__
    if _NORM.search(kind):
        return False
    return _SHAPE.search(kind) is not None or any(True for _ in following[0].parameters())


def find(network: nn.Module, candidates: Iterable[tuple[str, nn.Conv2d]]) -> dict[str, str]:
    """Return which candidates are a last layer, a gate or a head, by name.

    Args:
        network: the plain network.
        candidates: names and layers of ``network``.

    Returns:
        ``LAST``, ``GATE`` or ``HEAD`` for those that are one.
    """
    gates = {conv for parent in network.modules() for conv in _gates(parent)}
    last = _last(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    found = {}
    for name, conv in candidates:
        if conv is network:
            continue
        path = name.split(".")
        parents = [modules[".".join(path[:depth])] for depth in range(len(path))]
        named = [_HEAD_NAME.fullmatch(part) is not None for part in path]
        inside = any(named) or any(_HEAD_CLASS.search(type(part).__name__) for part in parents)
        if conv in gates:
            found[name] = GATE
        elif conv is last:
            found[name] = LAST
        elif inside and _ends(parents[-1], conv) and _final(parents[-1], conv, named[-1]):
            found[name] = HEAD
    return found


def _final(parent: nn.Module, conv: nn.Conv2d, named: bool) -> bool:
    """Whether a convolution inside a head is its output: by its name, window or place."""
    if named or _is_one_by_one(conv) or isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        return True
    return list(parent.children())[-1] is conv
