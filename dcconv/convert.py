"""From a plain network to a decoupled one: every ``nn.Conv2d`` becomes a ``DecoupledConv2d``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from dcconv import fusion, weights
from dcconv import heads as special
from dcconv.folding import guard
from dcconv.modules import DecoupledConv2d
from dcconv.operator import checks
from dcconv.warn import name_some, warn_user

# What a caller of a module registers on it; the handles go on working with the same dictionaries.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

# Those of the state dict hold the layer itself and cannot move to another one.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# What nn.Conv2d itself keeps as attributes; all others are somebody's own.
_ATTRIBUTES = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))

HEADS = ("warn", "plain", "convert")

_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(DecoupledConv2d.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def convert(
    module: nn.Module,
    *,
    select: Callable[[str, nn.Conv2d], object] | None = None,
    heads: str = "warn",
    fuse_norms: bool = False,
    **operator: Any,
) -> nn.Module:
    """Replace every ``nn.Conv2d`` of a network by a :class:`dcconv.DecoupledConv2d`.

    A new layer has its predecessor's geometry, padding mode, forward and backward hooks, training
    flag and attributes that others have set, and the very same ``weight`` and ``bias`` parameters,
    so that weights shared between layers stay shared. A layer that is used in several places stays
    one layer. The parameters and buffers that come with the operator (``radius_raw``,
    ``norm_mean``, ...) start as in a new layer: build the optimiser, and wrap the network for
    distributed training, after the conversion. The state dict of the plain network still loads
    strictly. No random numbers are drawn, and a network that is refused is left as it was.

    **A converted network answers by chance** until it has been trained on or its moving averages
    (``norm_mean``, batch normalisation) have been estimated anew: :func:`dcconv.calibrate`. A
    warning says so unless batch normalisation shows that the network has never seen a batch.

    **Last layers, gates and heads.** A bounded operator's output ends at alpha, so that a logit
    never exceeds 1, and a gate never opens. A warning names layers that look like the last one
    before the output, the gates of squeeze and excitation, and the outputs of segmentation and
    detection heads; ``heads="plain"`` leaves them. They are told by place and name, without
    running the network: look at the list, and use ``select`` for what it lacks.

    Converted are layers whose class is ``nn.Conv2d`` itself. Subclasses compute something of their
    own and stay as they are, and so do transposed, 1-D and 3-D convolutions; a warning names them.
    Batch normalisation cannot be folded into a decoupled layer, since its output does not scale
    with its weight: methods of the network that do so (``fuse``, ``reparameterize``,
    ``switch_to_deploy``) raise ValueError from now on. A weight that is
    computed from other parameters (weight norm, spectral norm, pruning) is refused, and so is a
    lazy layer that has not seen an input; ``select`` can leave either plain.

    **Fused batch normalisation.** With ``fuse_norms=True`` an ``nn.BatchNorm2d`` that is followed
    by an ``nn.ReLU`` alone, and whose result reaches a decoupled layer, becomes a
    :class:`dcconv.BatchNormAct2d`, which finds the layer's norms on its way; the ReLU returns such
    an input as it is. Both stay the same module objects, with their parameters, buffers and hooks.
    Which they are is read from ``torch.fx`` graphs in both modes of the network, of its parts where
    the whole cannot be traced: forward methods are run on symbols, in which attributes that they
    set are set back. :func:`dcconv.fusion.why_not` has the reason for every layer that stays.

    An in-place activation straight after a convolution overwrites the output, which backward
    needs in most cases (``keep="auto"``): PyTorch raises its error about a variable "modified by
    an inplace operation". ``keep="dot"`` permits it. Batch normalisation in between does too.

    Args:
        module: a network, converted in place; a single ``nn.Conv2d`` is not changed.
        select: called once with the name and the layer of every candidate; layers for which it
            returns a false value stay plain. A shared layer has the name of its first place.
        heads: what becomes of last layers, gates and heads among the selected layers: ``warn``
            converts and names them, ``convert`` is silent about it, ``plain`` leaves them.
        fuse_norms: whether to fuse batch normalisations; a warning says if none could be.
        operator: the keyword arguments of :class:`dcconv.DecoupledConv2d`: ``magnitude``,
            ``angular``, ``radius``, ``keep``, ``backend``, ...

    Returns:
        The module itself; for a single ``nn.Conv2d`` the new layer.

    Raises:
        TypeError: module is no module, select cannot be called, or an argument has a wrong type.
        ValueError: no layer is left to convert, one cannot be converted, or an argument is wrong.

    Example:
        >>> import dcconv
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1))
        >>> dcconv.convert(network, heads="plain", magnitude="ball")
        Sequential(
          (0): DecoupledConv2d(3, 8, kernel_size=(3, 3), bias=True, magnitude='ball')
          (1): ReLU()
          (2): Conv2d(8, 10, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if not isinstance(module, nn.Module):
        raise checks.type_error("module", "be an nn.Module", type(module).__name__)
    if select is not None and not callable(select):
        raise checks.type_error(
            "select", "be a function of a name and a layer", type(select).__name__
        )
    checks.choice("heads", heads, HEADS)
    fuse_norms = checks.boolean("fuse_norms", fuse_norms)
    for name in operator:
        if name not in _ARGUMENTS:
            rule = f"be among {', '.join(_ARGUMENTS)}"
            raise checks.type_error("keyword arguments", rule, repr(name))
    for part in module.modules():
        if isinstance(part, DistributedDataParallel) or weights.is_wrapped(part):
            raise checks.value_error("module", weights.BEFORE_WRAPPING, type(module).__name__)

    candidates = {name: part for name, part in module.named_modules() if _is_candidate(part)}
    if not candidates:
        got = type(module).__name__
        if others := _others(module):
            got += f" with layers of other classes alone: {_listed(others)}"
        raise checks.value_error("module", "have an nn.Conv2d layer", got)
    chosen = {
        name: conv for name, conv in candidates.items() if select is None or select(name, conv)
    }
    if not chosen:
        rule = f"choose one of the module's {len(candidates)} nn.Conv2d layers or more"
        raise checks.value_error("select", rule, "none")
    found = special.find(module, chosen.items())
    if heads == "plain":
        chosen = {name: conv for name, conv in chosen.items() if name not in found}
        if not chosen:
            rule = "be 'warn' or 'convert' where every chosen layer is a last layer, gate or head"
            raise checks.value_error("heads", rule, "'plain'")
    layers = {conv: _decoupled(name, conv, operator) for name, conv in chosen.items()}

    if isinstance(module, nn.Conv2d) and module in layers:
        return layers[module]
    for parent in list(module.modules()):
        # Not named_children(): it leaves out the second place of a shared layer.
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Conv2d) and child in layers:
                parent.register_module(name, layers[child])
    guard(module)
    if fuse_norms:
        _fuse(module, operator.get("backend"))
    _warn_of_statistics(module, next(iter(layers.values())))
    if heads == "warn" and found:
        _warn_of_heads(found, next(iter(layers.values())))
    if others := _others(module):
        warn_user(f"convert left convolutions of other classes plain: {_listed(others)}")
    return module


def _fuse(module: nn.Module, backend: str | None) -> None:
    said = fusion.fuse(module, backend)
    reasons = [reason for reason in said.values() if reason is not None]
    if len(reasons) == len(said):
        left = name_some(list(said), reasons) if said else "there is no nn.BatchNorm2d"
        warn_user(f"convert(fuse_norms=True) fused no batch normalisation: {left}")


def _others(module: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions that are no candidates."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _ConvNd) and not _is_candidate(part)
    }


def _listed(parts: dict[str, nn.Module]) -> str:
    return name_some(
        [name or "the module" for name in parts], [type(p).__name__ for p in parts.values()]
    )


def _warn_of_heads(found: dict[str, str], layer: DecoupledConv2d) -> None:
    if not layer.operator.is_plain:
        warn_user(
            "convert took over what looks like last layers, gates or heads, whose output a bounded "
            "operator ends at alpha (heads='plain' leaves them, heads='convert' is silent): "
            + name_some(list(found), list(found.values()))
        )


def _warn_of_statistics(module: nn.Module, layer: DecoupledConv2d) -> None:
    """Say that averages are stale, unless batch normalisation shows that nothing was trained."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if layer.operator.is_plain or layer.weight.is_meta or any(count.is_meta for count in counts):
        return
    if any(int(count) for count in counts) or (layer.uses_norm_mean and not counts):
        warn_user(
            "convert leaves the moving averages (norm_mean, batch normalisation) those of another "
            "operator or of none: train the network, or estimate them by dcconv.calibrate(network, "
            "batches), before it is evaluated"
        )


def _is_candidate(part: nn.Module) -> bool:
    # A parametrised layer, and only that, has a class made for it.
    kind = type(part).__mro__[1] if parametrize.is_parametrized(part) else type(part)
    return kind in (nn.Conv2d, nn.LazyConv2d)


def _why_not(conv: nn.Conv2d) -> str | None:
    """Return what a layer would have to be to be converted, or None if it can be."""
    if isinstance(conv, nn.LazyConv2d):
        return "have its shape: run the network once first"
    if parametrize.is_parametrized(conv) or conv._parameters.get("weight") is None:
        return weights.OWN
    # A layer of a wrapped network, without its wrapper.
    if checks.is_dtensor(conv.weight) or weights.is_sharded_flat(conv.weight):
        return weights.BEFORE_WRAPPING
    if any(getattr(conv, hooks) for hooks in _STATE_HOOKS):
        return "have no hooks on its state dict: remove them first"
    for name, value in vars(conv).items():
        if name == "forward" or (isinstance(value, types.MethodType) and value.__self__ is conv):
            return f"have its class's own methods: remove what replaces {name}() first"
    return None


def _take_over(conv: nn.Conv2d, layer: DecoupledConv2d) -> str | None:
    """Give a layer what others have set on its predecessor, or return a name that is taken."""
    states = ("_parameters", "_buffers", "_modules")
    own = {name: value for name, value in vars(conv).items() if name not in _ATTRIBUTES}
    more = {
        s: {n: v for n, v in vars(conv)[s].items() if n not in ("weight", "bias")} for s in states
    }
    for name in (*own, *(name for state in more.values() for name in state)):
        if hasattr(layer, name):
            return str(name)
    vars(layer).update(own)
    for state, values in more.items():
        vars(layer)[state].update(values)
    layer._non_persistent_buffers_set |= conv._non_persistent_buffers_set
    return None


def _decoupled(name: str, conv: Any, operator: dict[str, Any]) -> DecoupledConv2d:
    reason = _why_not(conv)
    if reason is not None:
        raise weights.error(name, conv, reason, "module")
    # On the CPU, then moved: only that generator's state has to be restored.
    with torch.random.fork_rng(devices=()):
        layer = DecoupledConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="cpu",
            dtype=conv.weight.dtype,
            **operator,
        )
    layer.to(conv.weight.device)
    layer._parameters["weight"], layer._parameters["bias"] = conv.weight, conv.bias
    taken = _take_over(conv, layer)
    if taken is not None:
        rule = f"have no attribute '{taken}', a name that DecoupledConv2d needs"
        raise weights.error(name, conv, rule, "module")
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(conv, hooks))
    return layer.train(conv.training)
