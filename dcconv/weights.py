"""Where a layer's filters are: its own, computed from other tensors, or sharded over processes.

``layer.weight`` alone does not say it: a parametrisation or a hook computes it anew for every
forward, and sharding puts a gathered copy in its place that is dropped afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dcconv.operator import checks
from dcconv.operator.reference import filter_norm

OWN = "own its weight: remove weight norm, spectral norm, pruning or the like first"
BEFORE_WRAPPING = "be converted before it is wrapped for distributed training"
# The class that keeps flat parameters.
FLAT = "FullyShardedDataParallel"
# A layer's parameters that no filter depends on.
_OTHERS = ("bias", "radius_raw", "k_raw")

_WHOLE = "have its whole weight: pass the FullyShardedDataParallel module that holds it"
_CONNECTED = (
    "have its whole weight and pass its gradient on: take the penalty inside the forward of the "
    "FullyShardedDataParallel module, in a unit that holds the layer directly, or use fully_shard"
)


class _Weigh(torch.autograd.Function):
    """The weight [o, c, r, s] as it is, whose gradient is multiplied by one number per filter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, factors: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        weighed = grad.to(factors.dtype) * factors.reshape(-1, 1, 1, 1)
        return weighed.to(grad.dtype), None


def weighed(weight: Tensor, scales: tuple[float, ...], eps: float) -> Tensor:
    """Return the weight; its gradient is multiplied by scale * sqrt(||w||^2 + eps) per scale.

    Every use of the result weighs its own part of the gradient once. A hook on the parameter would
    miss gradients of computed and gathered weights, and parameters that are put in its place.
    """
    if not scales or not torch.is_grad_enabled():
        return weight
    a = filter_norm(weight.detach(), eps)
    factors = scales[0] * a
    for scale in scales[1:]:
        factors = factors * (scale * a)
    result: Tensor = _Weigh.apply(weight, factors)
    return result


def whole(tensor: Tensor) -> Tensor:
    """Return a plain tensor: a DTensor is gathered, differentiably, on all its processes."""
    if not checks.is_dtensor(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def error(name: str, layer: nn.Module, rule: str, whole: str = "model") -> ValueError:
    """Build the error about a layer of a model, or about the ``whole`` if it is the layer."""
    argument = f"layer '{name}'" if name else whole
    return checks.value_error(argument, rule, type(layer).__name__)


def _shape(layer: Any) -> tuple[int, ...]:
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def is_sharded_flat(weight: Tensor) -> bool:
    """Whether a parameter is a part of a flat parameter of FullyShardedDataParallel."""
    return bool(getattr(weight, "_fsdp_flattened", False))


def _is_fsdp(module: nn.Module, kind: str) -> bool:
    """Whether a module is of one of FSDP's classes, which somebody has imported then."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, kind))


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is a unit of FullyShardedDataParallel, fully_shard or replicate."""
    if _is_fsdp(module, "FSDPModule") or _is_fsdp(module, FLAT):
        return True
    # Functions that wrap a module in place leave their names with it.
    contract: Any = sys.modules.get("torch.distributed._composable.contract")
    return contract is not None and "replicate" in (contract._get_registry(module) or ())


def _computed(layer: nn.Module) -> Tensor | None:
    """Return what a hook in the older style puts into ``layer.weight`` at the next forward.

    The attribute itself is of the last forward: it may be older than the parameters behind it, and
    without a graph after an evaluation. Spectral norm takes no step of its power iteration here.
    """
    result: Tensor | None = None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            result = hook.compute_weight(layer)
        elif isinstance(hook, SpectralNorm) and hook.name == "weight":
            result = hook.compute_weight(layer, do_power_iteration=False)
        elif isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            result = hook.apply_mask(layer)
    return result


def to_read(name: str, layer: Any, in_fsdp: bool) -> Tensor:
    """Return a layer's filters, plain and whole, connected to what an optimiser trains.

    Args:
        name: of the layer, for the message.
        layer: a decoupled layer.
        in_fsdp: whether the model has units of FullyShardedDataParallel.

    Raises:
        ValueError: they are sharded in a way that gives no gradient here.
    """
    sharded = {name: p for name, p in layer.named_parameters() if checks.is_dtensor(p)}
    if sharded:
        # Gathered first: masks and the vectors of spectral norm are no DTensors.
        gathered = {f"layer.{name}": whole(p) for name, p in sharded.items() if name not in _OTHERS}
        filters: Tensor = functional_call(_Filters(layer), gathered, ())
        return filters
    weight: Tensor | None = None if _has_freed(layer) else _Filters(layer)()
    flat = weight is not None and (in_fsdp or is_sharded_flat(weight))
    if weight is None or weight.shape != _shape(layer) or (flat and not _is_connected(weight)):
        raise error(name, layer, _CONNECTED)
    return weight


class _Filters(nn.Module):
    """What a layer's next forward convolves with, [o, c, r, s]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        computed = _computed(self.layer)
        weight: Any = self.layer.weight if computed is None else computed
        result: Tensor = weight
        return result


def _has_freed(layer: Any) -> bool:
    """Whether a view of a gathered flat parameter, whose memory is gone, stands in a layer."""
    if layer._parameters.get("weight") is not None:
        return False
    places = [layer]
    if parametrize.is_parametrized(layer, "weight"):
        places.append(layer.parametrizations["weight"])
    tensors = [t for place in places for t in vars(place).values() if isinstance(t, Tensor)]
    return any(t.numel() and not t.untyped_storage().size() for t in tensors)


def _is_connected(weight: Tensor) -> bool:
    """Whether a view of a flat parameter passes gradients on, as far as any are wanted."""
    if not torch.is_grad_enabled():
        return True
    try:
        return weight.requires_grad and not weight.is_leaf
    except RuntimeError:
        # It has no graph to ask for: its base has been written to without autograd.
        return False


def in_fsdp(model: nn.Module) -> bool:
    """Whether a model has units of FullyShardedDataParallel."""
    return any(_is_fsdp(module, FLAT) for module in model.modules())


def _to_write(name: str, layer: Any, summoned: bool) -> Tensor:
    weight = layer._parameters.get("weight")
    if isinstance(weight, Tensor) and is_sharded_flat(weight) and not summoned:
        raise error(name, layer, _WHOLE)
    if not isinstance(weight, Tensor) or parametrize.is_parametrized(layer, "weight"):
        raise error(name, layer, OWN)
    if weight.shape != _shape(layer):
        raise error(name, layer, _WHOLE)
    return weight


def _reshard(layers: list[nn.Module]) -> None:
    """Put the sharded parameters back into the layers that fully_shard has gathered.

    After a forward without gradients the root's layers hold the gathered ones, and what is
    written to those is lost. The units may be above the model that the caller knows.
    """
    states: Any = sys.modules.get("torch.distributed._composable_state")
    wanted = set(layers)
    for unit in [] if states is None else list(states._module_state_mapping):
        if _is_fsdp(unit, "FSDPModule") and not wanted.isdisjoint(unit.modules()):
            unit.reshard()


@contextmanager
def to_write(model: nn.Module, layers: dict[str, Any]) -> Iterator[list[tuple[Any, Tensor]]]:
    """Yield pairs of a layer and its weight, to be written in place; a shared weight comes once.

    A weight is a parameter or, under fully_shard, a DTensor; FullyShardedDataParallel gathers its
    flat parameters meanwhile and takes over what is written. Every process has to come here.

    Raises:
        ValueError: a layer's weight is computed from other tensors, or is a part of a flat
            parameter whose FullyShardedDataParallel module is not in the model.
    """
    with ExitStack() as stack:
        summoned = in_fsdp(model)
        if summoned:
            # A caller's own summon_full_params has gathered them, and they do not nest.
            root: Any = next(unit for unit in model.modules() if _is_fsdp(unit, FLAT))
            if root.training_state.name != "SUMMON_FULL_PARAMS":
                stack.enter_context(root.summon_full_params(model))
        _reshard(list(layers.values()))
        found: dict[int, tuple[Any, Tensor]] = {}
        for name, layer in layers.items():
            weight = _to_write(name, layer, summoned)
            found.setdefault(id(weight), (layer, weight))
        yield list(found.values())


def divide_filters(weight: Tensor, eps: float) -> None:
    """Divide a weight, also a DTensor, by its filters' norms, in place."""
    full = whole(weight)
    a = filter_norm(full, eps).reshape(-1, 1, 1, 1)
    quotient = (full.to(a.dtype) / a).to(weight.dtype)
    if checks.is_dtensor(weight):
        from torch.distributed.tensor import DTensor, Replicate

        # Every process keeps its part. An in-place operation with DTensors is refused where it
        # may broadcast, as over a single filter.
        mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
        replicated = DTensor.from_local(quotient, mesh, [Replicate()] * mesh.ndim, run_check=False)
        quotient = replicated.redistribute(placements=placements).to_local()
        weight = weight.to_local()  # type: ignore[attr-defined]
    weight.copy_(quotient)
