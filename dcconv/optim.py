"""Optimisation tricks of the paper (spec 4.1): projection, penalty, weighted gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dcconv import weights
from dcconv.modules import DecoupledConv2d
from dcconv.operator import checks
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.reference import filter_norm


def decoupled_layers(model: nn.Module) -> Iterator[DecoupledConv2d]:
    """Return the decoupled layers of a model, each once."""
    return (part for part in model.modules() if isinstance(part, DecoupledConv2d))


def _require_layers(model: nn.Module) -> dict[str, DecoupledConv2d]:
    """Return the decoupled layers of a model by their names, each once."""
    if not isinstance(model, nn.Module):
        raise checks.type_error("model", "be an nn.Module", type(model).__name__)
    layers = {n: part for n, part in model.named_modules() if isinstance(part, DecoupledConv2d)}
    if not layers:
        raise checks.value_error("model", "have a DecoupledConv2d layer", type(model).__name__)
    return layers


@torch.no_grad()
def project_weights(model: nn.Module) -> None:
    """Project every decoupled filter: w <- w / sqrt(||w||^2 + eps) (spec 2.6), in place.

    Optimiser state is not touched. Contradicts weighted operators, whose magnitude is ||w||. A
    weight that several layers share is projected once, with the eps of the first. Sharded weights
    (``fully_shard``, ``FullyShardedDataParallel``) are gathered, so every process has to call it.

    Args:
        model: a module with at least one ``DecoupledConv2d``; eps is each layer's own.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no decoupled layer, or one whose weight is computed from other tensors
            (weight norm, spectral norm, pruning), or a layer of a ``FullyShardedDataParallel``
            module that is not in the model. Nothing is projected then.

    Example:
        >>> import dcconv
        >>> layer = dcconv.DecoupledConv2d(3, 4, 3)
        >>> dcconv.project_weights(layer)
        >>> bool((layer.weight.square().sum(dim=(1, 2, 3)) <= 1).all())
        True
    """
    with weights.to_write(model, _require_layers(model)) as pairs:
        for layer, weight in pairs:
            weights.divide_filters(weight, layer.eps)


def _that_steps(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser itself, or the one that it wraps and whose step calls the hooks."""
    rule = "be a torch.optim.Optimizer that was initialised, or wrap one as its attribute optimizer"
    found: Any = optimizer
    # An optimiser's constructor makes its class call hooks; wrappers do not run it.
    while not (
        isinstance(found, torch.optim.Optimizer) and getattr(type(found).step, "hooked", False)
    ):
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            raise checks.type_error("optimizer", rule, type(optimizer).__name__)
        found = inner
    if found is not optimizer:
        # Wrappers that train copies write these over the parameters afterwards.
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(p) in own for group in found.param_groups for p in group["params"]):
            rule = "wrap an optimiser of the model's own parameters"
            raise checks.value_error("optimizer", rule, type(optimizer).__name__)
    result: torch.optim.Optimizer = found
    return result


# The counters of each optimiser's projections: their names in its first group of parameters.
_counters: WeakKeyDictionary[torch.optim.Optimizer, set[str]] = WeakKeyDictionary()


class Projection:
    """Projections that go on until they are removed; :func:`register_projection` makes it."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, every: int) -> None:
        taken = _counters.setdefault(optimizer, set())
        names = (f"projection_steps_{i}" if i else "projection_steps" for i in count())
        counter = next(name for name in names if name not in taken)
        taken.add(counter)

        def project(*_: Any) -> None:
            # Looked up at every step: load_state_dict puts other dictionaries in place of these.
            group = optimizer.param_groups[0]
            iteration = group.get(counter, 0)
            if iteration and iteration % every == 0:
                project_weights(model)
            group[counter] = iteration + 1

        self._ending = ExitStack()
        self._ending.callback(optimizer.register_step_post_hook(project).remove)
        self._ending.callback(taken.discard, counter)
        self._ending.callback(lambda: optimizer.param_groups[0].pop(counter, None))

    def remove(self) -> None:
        """End the projections and forget how many steps they have counted."""
        self._ending.close()


def register_projection(
    optimizer: torch.optim.Optimizer, model: nn.Module, every: int = 100
) -> Projection:
    """Project the model's filters after every ``every``-th optimiser step but the first.

    The official schedule: at iteration i (from 0) when i > 0 and i is a multiple of 100, after
    that iteration's step (spec 2.6). The optimiser's first group of parameters holds the count,
    ``projection_steps``, so a run that restores ``optimizer.state_dict()`` goes on counting,
    whether it registers before or after. A second projection of the same optimiser has a count of
    its own; register them in the same order again.

    Args:
        optimizer: any ``torch.optim.Optimizer``; a post-step hook is registered on it. Of a wrapper
            that leaves the step to its attribute ``optimizer`` (accelerate, Lightning), on that
            one: steps that the wrapper leaves out are not counted.
        model: as :func:`project_weights`.
        every: iterations between projections, at least 1.

    Returns:
        A handle; ``remove()`` ends the projections.

    Raises:
        TypeError, ValueError: as :func:`project_weights`, or ``every`` is wrong, or the optimizer
            is none whose steps call hooks, or wraps one that trains copies of the parameters.

    Example:
        >>> import dcconv, torch
        >>> layer = dcconv.DecoupledConv2d(3, 4, 3)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = dcconv.register_projection(optimizer, layer)
    """
    every = checks.size("every", every, 1)
    layers = _require_layers(model)
    stepping = _that_steps(optimizer, model)
    # What cannot be projected is said now, not after a hundred steps.
    with weights.to_write(model, layers):
        pass
    return Projection(stepping, model, every)


def orthogonality_penalty(model: nn.Module, coefficient: float = 1e-5) -> Tensor:
    """Penalise correlated filters: coefficient / 2 * sum over layers of ||W^T W - I||_F^2.

    W holds a layer's filters divided by their norms, one column each (spec 2.5); filters of
    different groups see different channels and are not compared. Weights that are computed from
    other tensors (weight norm, pruning, ...) are taken as the next forward has them, and the
    gradient goes to those tensors. DTensors (``fully_shard``) are gathered: every process has to
    call it, and the result is a plain tensor.

    Args:
        model: as :func:`project_weights`.
        coefficient: a number of at least 0; 1e-5 is the official value.

    Returns:
        A differentiable scalar, float32 (float64 for float64 layers).

    Raises:
        TypeError, ValueError: model is no module or has no decoupled layer, the coefficient is
            wrong, or ``FullyShardedDataParallel`` holds a layer's weight in a flat parameter: that
            passes gradients on in its own forward only.

    Example:
        >>> import dcconv
        >>> dcconv.orthogonality_penalty(dcconv.DecoupledConv2d(3, 1, 3)).item() < 1e-5
        True
    """
    checks.number("coefficient", coefficient, "be a finite number of at least 0", 0.0, closed=True)
    total: Tensor | None = None
    layers = _require_layers(model)
    in_fsdp = weights.in_fsdp(model)
    for name, layer in layers.items():
        weight = weights.to_read(name, layer, in_fsdp)
        weight = weights.weighed(weight, layer.gradient_scales, layer.eps)
        weight = weight.to(compute_dtype(weight.dtype))
        a = filter_norm(weight, layer.eps).reshape(-1, 1, 1, 1)
        unit = (weight / a).flatten(1).unflatten(0, (layer.groups, -1))  # [g, o / g, c r s / g]
        gram = unit @ unit.mT
        error = (gram - gram.new_ones(gram.shape[-1]).diag_embed()).square()
        total = error.sum() if total is None else total + error.sum()
    assert total is not None
    return total * (0.5 * coefficient)


def register_weighted_gradients(model: nn.Module, scale: float = 1.0) -> Callable[[], None]:
    """Multiply every decoupled filter's gradient by scale * ||w|| (spec 4.1, "weighted gradients").

    Cancels the 1 / ||w|| factor of the tangential gradient: the step is what it would be on the
    unit sphere. Pointless with optimisers that normalise each parameter's gradient.

    ||w|| is sqrt(||w||^2 + eps). Weighed are the gradients of the layers' outputs and of
    :func:`orthogonality_penalty`, each part once, where they leave the filters as the layer uses
    them: also if those are computed from other tensors, gathered from shards, shared between
    layers, or put into the layer later. What else reads ``layer.weight`` in the loss is not.

    Args:
        model: as :func:`project_weights`; wrapped for distributed training before or afterwards.
        scale: a number above 0.

    Returns:
        A function that ends it.

    Raises:
        TypeError, ValueError: model is no module or has no decoupled layer, or the scale is wrong.

    Example:
        >>> import dcconv
        >>> remove = dcconv.register_weighted_gradients(dcconv.DecoupledConv2d(3, 4, 3))
        >>> remove()
    """
    checks.number("scale", scale, "be a finite number above 0", 0.0)
    scale = float(scale)
    layers = list(_require_layers(model).values())
    for layer in layers:
        layer.gradient_scales = (*layer.gradient_scales, scale)

    def remove() -> None:
        for layer in layers:
            scales = list(layer.gradient_scales)
            scales.remove(scale)
            layer.gradient_scales = tuple(scales)
        layers.clear()

    return remove
