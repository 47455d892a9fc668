"""Start a decoupled network from a plain one of the same shape (spec 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcconv import DecoupledConv2d, project_weights
from dcconv.operator.checks import type_error, value_error
from dcconv.optim import decoupled_layers
from train.engine.files import MOST_TENSORS, ContentError, load_tensors, read_file, reason_of
from train.networks.statistics import estimate_statistics

# Where checkpoints keep the network, and what wrappers put before the names of its tensors.
_FOLDED_INTO = ("network", "model", "state_dict", "task")
_PREFIXES = ("module.", "_orig_mod.")


def load_plain(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a trained network, by name.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote of a state dict or of a
            checkpoint with one under ``network``, ``model`` or ``state_dict``; read without
            running any code in it.

    Raises:
        ValueError: there is no such file, or it holds no state dict.
    """
    path = Path(path)
    rule = "be a file of a network's tensors"
    try:
        content = read_file(path, MOST_TENSORS)
        if path.suffix == ".safetensors":
            state: Any = load_safetensors(content)
        else:
            state = load_tensors(content)
    except FileNotFoundError as error:
        raise value_error("pretrained", rule, f"'{path}' (no such file)") from error
    except (ContentError, OSError, SafetensorError) as error:
        raise value_error("pretrained", rule, f"'{path}' ({reason_of(error)})") from error
    while isinstance(state, Mapping):
        inner = next((key for key in _FOLDED_INTO if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    if not isinstance(state, Mapping) or not state:
        raise value_error("pretrained", rule, f"'{path}' (a {type(state).__name__} of nothing)")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise value_error("pretrained", rule, f"'{path}' ({name!r} is no tensor)")
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        tensors[name] = tensor
    return tensors


def _statistics(network: nn.Module) -> set[str]:
    """Return the names of batch normalisation's moving averages."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    }


def _own(network: nn.Module) -> set[str]:
    """Return the names of the tensors that decoupled layers have and plain ones have not."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, DecoupledConv2d)
        for name in ("radius_raw", "k_raw", "norm_mean", "norm_mean_steps")
    }


@torch.no_grad()
def start_from_plain(
    network: nn.Module,
    state: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    *,
    leave: tuple[str, ...] = (),
) -> int:
    """Start a decoupled network from the tensors of a plain network of the same shape.

    Filters are copied and projected onto the unit sphere (not those of weighted operators, whose
    magnitude they are), the radius starts at raw 1, everything else is copied. Moving averages
    are estimated anew: the operators' outputs have other scales than the convolutions' had.
    Nothing is changed unless every tensor fits.

    Args:
        network: has at least one decoupled layer.
        state: the plain network's tensors, see :func:`load_plain`. Its moving averages are not
            used and may be missing.
        batches: images [n, c, h, w] on the network's device, normalised as in training; some
            hundred images or more.
        leave: beginnings of names of tensors that stay as they are, say the classifier for other
            classes.

    Returns:
        The number of batches used.

    Raises:
        TypeError, ValueError: a tensor is missing, unknown or of another shape, or there is no
            batch.

    Example:
        >>> import torch
        >>> from train.networks import build_network
        >>> plain = build_network("resnet32", "conv", 10, widths=(4, 4, 4))
        >>> network = build_network("resnet32", "tanh_cosine", 10, widths=(4, 4, 4))
        >>> start_from_plain(network, plain.state_dict(), [torch.rand(4, 3, 16, 16)])
        1
    """
    if not isinstance(leave, tuple):
        raise type_error("leave", "be a tuple of names' beginnings", type(leave).__name__)
    layers = list(decoupled_layers(network))
    if not layers:
        raise value_error("network", "have a DecoupledConv2d layer", type(network).__name__)
    # The batches come last, but without any the network must not be left half changed.
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise value_error("batches", "hold at least one batch of images", "none")

    own, statistics = _own(network), _statistics(network)
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if name not in own and name not in statistics and not name.startswith(leave)
    }
    for name in state:
        if name not in wanted and name not in statistics and not name.startswith(leave):
            raise value_error(
                "pretrained", "hold tensors that the network has, and no other", f"'{name}'"
            )
    for name, tensor in wanted.items():
        shape = list(tensor.shape)
        if name not in state:
            raise value_error("pretrained", f"hold '{name}' of shape {shape}", "none")
        if list(state[name].shape) != shape:
            got = list(state[name].shape)
            raise value_error("pretrained", f"hold '{name}' of shape {shape}", got)
    for name, tensor in wanted.items():
        tensor.copy_(state[name])
    for layer in layers:
        if layer.weighting == "none":
            project_weights(layer)
        if layer.radius_raw is not None:
            layer.radius_raw.fill_(1.0)

    def all_batches() -> Iterable[Tensor]:
        yield first
        yield from rest

    return estimate_statistics(network, all_batches())
