"""Moving averages estimated anew: of batch normalisation and of the mean patch norm alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from dcconv.modules import DecoupledConv2d
from dcconv.operator import checks
from dcconv.warn import name_some, warn_user

Averaging = DecoupledConv2d | _BatchNorm

_BUFFERS = ("norm_mean", "norm_mean_steps", "running_mean", "running_var", "num_batches_tracked")


def averaging_layers(model: nn.Module) -> dict[str, Averaging]:
    """Return a model's layers that keep moving averages, by name, each once."""
    found: dict[str, Averaging] = {}
    for name, module in model.named_modules():
        own = isinstance(module, DecoupledConv2d) and module.uses_norm_mean
        if own or (isinstance(module, _BatchNorm) and module.running_mean is not None):
            found[name] = module
    return found


def _statistics(layer: Averaging) -> dict[str, Tensor]:
    buffers = {name: layer._buffers.get(name) for name in _BUFFERS}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _forget(layer: Averaging) -> None:
    """Set the averages to their start, so that nothing of them is left, not even NaN."""
    if isinstance(layer, DecoupledConv2d):
        for buffer in _statistics(layer).values():
            buffer.zero_()
    else:
        layer.reset_running_stats()


@contextmanager
def _averaging_alone(model: nn.Module, layers: Iterable[Averaging]) -> Iterator[Counter[nn.Module]]:
    """Let the given layers average alike over their calls, in training mode; all others evaluate.

    Yields the layers' numbers of calls.
    """
    calls: Counter[nn.Module] = Counter()
    modes = [(module, module.training) for module in model.modules()]
    momenta: list[tuple[Any, str, Any]] = []
    hooks = []
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer.training = True
            name = "norm_momentum" if isinstance(layer, DecoupledConv2d) else "momentum"
            momenta.append((layer, name, getattr(layer, name)))

            def next_call(module: nn.Module, _: Any, name: str = name) -> None:
                calls[module] += 1
                setattr(module, name, 1.0 / calls[module])

            hooks.append(layer.register_forward_pre_hook(next_call))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for layer, name, momentum in momenta:
            setattr(layer, name, momentum)
        for module, mode in modes:
            module.training = mode


def _images(batch: Any) -> Any:
    """Return what a batch gives to the model: itself, or its first part, as a loader's pairs."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        rule = "hold tensors, or tuples or lists that begin with one"
        raise checks.type_error("batches", rule, type(images).__name__)
    if not images.numel():
        raise checks.value_error("batches", "hold images", f"shape {list(images.shape)}")
    return images


def _restore(layer: Averaging, former: dict[str, Tensor]) -> None:
    for key, buffer in _statistics(layer).items():
        buffer.copy_(former[key])


def _check_finite(name: str, layer: Averaging) -> None:
    for key, buffer in _statistics(layer).items():
        if not bool(buffer.isfinite().all()):
            argument = f"give layer '{name}' finite statistics"
            raise checks.value_error("batches", argument, f"a {key} that is not")


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set every moving average of a model to the mean over the batches' own statistics.

    That is the mean patch norm of decoupled layers, norm_mean = (1 / B) sum of m_i over B batches,
    and batch normalisation's running mean and variance likewise; what they were before is
    forgotten. A network needs it after :func:`dcconv.convert`, after a plain network's state was
    loaded and after weights were averaged or projected, before it is evaluated.
    ``torch.optim.swa_utils.update_bn`` sees batch normalisation alone and leaves ``norm_mean`` as
    it is. Unlike there, everything but the averaging layers evaluates meanwhile, so that dropout
    does not disturb the statistics.

    No gradients are kept and no parameter changes. Training flags and momenta are what they were
    afterwards; a call that is refused leaves everything as it was. With ``sync_norm=True`` and
    ``SyncBatchNorm`` every rank must call it with as many batches.

    Args:
        model: a module with at least one layer that keeps moving averages.
        batches: at least one input of the model, tensors [n, c, h, w] on its device with n >= 1;
            of a tuple or a list (images, labels), the first part counts. Every batch counts the
            same, so let them be of one size, and as large as in training.

    Returns:
        The number of batches.

    Raises:
        TypeError: model is no module, or a batch no tensor.
        ValueError: model keeps no moving average, there is no batch, a batch is empty or reaches
            no such layer, or statistics are not finite.

    Example:
        >>> import dcconv, torch
        >>> network = torch.nn.Sequential(dcconv.DecoupledConv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> dcconv.calibrate(network, [torch.randn(4, 3, 8, 8) for _ in range(3)])
        3
    """
    if not isinstance(model, nn.Module):
        raise checks.type_error("model", "be an nn.Module", type(model).__name__)
    layers = averaging_layers(model)
    if not layers:
        rule = "have a layer with moving averages (norm_mean, or batch normalisation's)"
        raise checks.value_error("model", rule, type(model).__name__)
    lazy = [
        name for name, layer in layers.items() if any(map(is_lazy, _statistics(layer).values()))
    ]
    if lazy:
        raise checks.value_error("model", "have its shapes: run it once first", name_some(lazy))
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        rule = "be an iterable of batches"
        raise checks.type_error("batches", rule, type(batches).__name__)
    for layer in layers.values():
        if isinstance(layer, DecoupledConv2d):
            layer.restore_average()
    former = {
        name: {key: buffer.clone() for key, buffer in _statistics(layer).items()}
        for name, layer in layers.items()
    }
    count = 0
    try:
        with _averaging_alone(model, layers.values()) as calls:
            for layer in layers.values():
                _forget(layer)
            for batch in batches:
                # Compiled code would be compiled anew for the averages' sake.
                with torch.compiler.set_stance("force_eager"):
                    model(_images(batch))
                count += 1
        if not count:
            raise checks.value_error("batches", "hold at least one batch of images", "none")
        unseen = [name for name, layer in layers.items() if not calls[layer]]
        if len(unseen) == len(layers):
            raise checks.value_error("batches", "reach a layer with moving averages", "none")
        for name, layer in layers.items():
            if name not in unseen:
                _check_finite(name, layer)
    except BaseException:
        for name, layer in layers.items():
            _restore(layer, former[name])
        raise
    for name in unseen:
        _restore(layers[name], former[name])
    if unseen:
        warn_user(
            f"calibrate kept the averages of layers that no batch reached: {name_some(unseen)}"
        )
    return count
