"""Which batch normalisations of a network become ``BatchNormAct2d``, and how.

A layer qualifies where every one of its calls is followed by a ReLU module alone, and what that
makes reaches a decoupled layer itself. That is read from graphs of ``torch.fx``, in training and in
evaluation mode; of modules that cannot be traced, those inside are read by themselves.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dcconv import pixel_sums, tracing
from dcconv.batch_norm import BatchNormAct2d
from dcconv.modules import DecoupledConv2d
from dcconv.passes.fused import SMALL_GROUP

# Hooks that see, or change, what the pair of layers has between its two.
_NORM_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_RELU_HOOKS = (*_NORM_HOOKS, "_forward_pre_hooks")
_EVERY_HOOK = (*_RELU_HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_STATES = ("_parameters", "_buffers", "_modules")

NOT_CALLED = "no call of it is in the graphs of torch.fx"
NOT_PLAIN = "it, or its ReLU, has hooks or a forward of its own that would see another tensor"
NO_RELU = "not every call of it is followed by an nn.ReLU module alone"
NO_LAYER = "what its ReLU makes reaches no decoupled layer that asks for norms"


class HandingReLU(tracing.Leaf, nn.ReLU):
    """``nn.ReLU`` that returns its input itself where a ``BatchNormAct2d`` has rectified it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return max(0, x)."""
        return input if pixel_sums.is_rectified(input) else F.relu(input, self.inplace)


class _Tracer(fx.Tracer):
    """A tracer that records modules it is told of as one call, and writes to no buffer."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self._opaque or super().is_leaf_module(module, name)


@contextlib.contextmanager
def _as_they_were(network: nn.Module, training: bool) -> Iterator[None]:
    """Have modules in a mode and without hooks; their attributes are restored afterwards."""
    before = [(part, dict(vars(part)), _copies(part)) for part in network.modules()]
    for part, *_ in before:
        vars(part)["training"] = training
        for hooks in _EVERY_HOOK:
            vars(part)[hooks] = OrderedDict()
    try:
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for part, own, states in before:
            vars(part).clear()
            vars(part).update(own)
            for name, content in states.items():
                own[name].clear()
                own[name].update(content)


def _copies(part: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(part)[name]) for name in _STATES}


class _Graph(NamedTuple):
    """A graph, and the nodes whose values modules have kept as attributes."""

    root: nn.Module
    graph: fx.Graph
    kept: set[fx.Node]


def _proxies(value: Any) -> Iterator[fx.Proxy]:
    """Yield what a tracer has put in the place of tensors, one container deep."""
    if isinstance(value, (list, tuple, set, dict)):
        values = value.values() if isinstance(value, dict) else value
        yield from (part for part in values if isinstance(part, fx.Proxy))
    elif isinstance(value, fx.Proxy):
        yield value


def _graph_of(part: nn.Module, opaque: set[nn.Module]) -> _Graph | None:
    try:
        graph = _Tracer(opaque).trace(part)
    except Exception:
        return None  # user code may raise whatever it likes on seeing no tensor
    attributes = [value for module in part.modules() for value in vars(module).values()]
    kept = {proxy.node for value in attributes for proxy in _proxies(value)}
    return _Graph(part, graph, kept)


def _graphs(part: nn.Module, opaque: set[nn.Module]) -> list[_Graph]:
    """Return graphs that have in them what can be traced below a module, and note what cannot."""
    found = _graph_of(part, opaque)
    if found is not None:
        return [found]
    inner: list[_Graph] = []
    for child in part.children():
        if not child.__module__.startswith("torch.nn") or next(child.children(), None) is not None:
            inner += _graphs(child, opaque)
    again = _graph_of(part, opaque) if opaque else None
    if again is None:
        opaque.add(part)
        return inner
    return [again, *inner]


class _Uses:
    """What the graphs say of one batch normalisation.

    Attributes:
        calls: how many there are.
        relus: the modules behind it.
        layers: decoupled layers that are reached.
        followed: whether every call is followed by a ReLU module alone.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.relus: set[nn.Module] = set()
        self.layers: list[DecoupledConv2d] = []
        self.followed = True


def _asks_for_norms(layer: nn.Module | None) -> TypeGuard[DecoupledConv2d]:
    """Whether a layer starts from sums; those of few channels per group are as large as x."""
    if not isinstance(layer, DecoupledConv2d) or layer.operator.norm_free:
        return False
    return layer.groups == 1 or layer.in_channels // layer.groups >= SMALL_GROUP


def _is_plain(part: nn.Module, kind: type[nn.Module], hooks: tuple[str, ...]) -> bool:
    own = vars(part)
    return type(part) is kind and "forward" not in own and not any(own[name] for name in hooks)


def _read(found: _Graph, uses: dict[nn.Module, _Uses]) -> None:
    """Add what a graph says."""
    parts = dict(found.root.named_modules(remove_duplicate=False))

    def called(node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls with one tensor alone."""
        plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return parts.get(str(node.target)) if plain else None

    for node in found.graph.nodes:
        if node.op != "call_module" or parts.get(str(node.target)) not in uses:
            continue
        use = uses[parts[str(node.target)]]
        use.calls += 1
        users = list(node.users)
        relu = called(users[0]) if len(users) == 1 else None
        alone = relu is not None and called(node) is not None and node not in found.kept
        if relu is None or not alone or type(relu) is not nn.ReLU:
            use.followed = False
            continue
        use.relus.add(relu)
        reached = [called(user) for user in users[0].users]
        use.layers += [layer for layer in reached if _asks_for_norms(layer)]


def _uses(network: nn.Module) -> dict[nn.Module, _Uses]:
    """Return what the graphs of a network, in both modes, say of its batch normalisations."""
    uses: dict[nn.Module, _Uses] = {
        part: _Uses()
        for part in network.modules()
        if isinstance(part, nn.BatchNorm2d) and not isinstance(part, BatchNormAct2d)
    }
    for training in (True, False):
        with _as_they_were(network, training):
            for found in _graphs(network, set()):
                _read(found, uses)
    return uses


def _why_not(norm: nn.Module, use: _Uses) -> str | None:
    """Return None for a batch normalisation that qualifies, else one sentence."""
    if not use.calls:
        return NOT_CALLED
    if not use.followed:
        return NO_RELU
    if not use.layers:
        return NO_LAYER
    plain = _is_plain(norm, nn.BatchNorm2d, _NORM_HOOKS) and not parametrize.is_parametrized(norm)
    if not plain or not all(_is_plain(relu, nn.ReLU, _RELU_HOOKS) for relu in use.relus):
        return NOT_PLAIN
    return None


def why_not(network: nn.Module) -> dict[str, str | None]:
    """Return by name of every ``nn.BatchNorm2d`` None if it qualifies, else one sentence why not.

    Args:
        network: a network with decoupled layers.

    Example:
        >>> import dcconv
        >>> from torch import nn
        >>> conv, norm = dcconv.DecoupledConv2d(3, 8, 3), nn.BatchNorm2d(3)
        >>> dcconv.fusion.why_not(nn.Sequential(norm, nn.ReLU(), conv))
        {'0': None}
        >>> dcconv.fusion.why_not(nn.Sequential(norm, conv))
        {'0': 'not every call of it is followed by an nn.ReLU module alone'}
    """
    uses = _uses(network)
    names = {part: name for name, part in network.named_modules()}
    return {names[norm]: _why_not(norm, use) for norm, use in uses.items()}


def fuse(network: nn.Module, backend: str | None = None) -> dict[str, str | None]:
    """Make every batch normalisation that qualifies a ``BatchNormAct2d``; return ``why_not``.

    Modules stay the objects that they are, with their parameters, buffers and hooks, and get
    another class: a network may keep them in places that nobody knows.

    Args:
        network: a network with decoupled layers, changed in place.
        backend: of the new layers.
    """
    uses = _uses(network)
    names = {part: name for name, part in network.named_modules()}
    said = {norm: _why_not(norm, use) for norm, use in uses.items()}
    for norm, use in uses.items():
        if said[norm] is not None:
            continue
        groups = [layer.groups for layer in use.layers]
        fused: Any = norm
        fused.__class__ = BatchNormAct2d
        fused.groups, fused.backend = max(groups, key=groups.count), backend
        fused.before_relu = True
        for relu in use.relus:
            relu.__class__ = HandingReLU
    return {names[norm]: reason for norm, reason in said.items()}
