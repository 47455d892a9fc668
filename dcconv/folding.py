"""Refusals for libraries that fold batch normalisation into a layer's weight and bias by hand.

Folding multiplies every filter by a number s and adds an offset. A convolution's output is then s
times what it was; a decoupled layer's is not, because its angle does not know how long a filter
is. Only weighting ``linear`` with ``cosine`` scales: a h(b) c is h(b) u / b.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from dcconv.operator import checks
from dcconv.operator.records import Operator

# What libraries call the method that turns a block's branches and norms into one nn.Conv2d: timm,
# ultralytics, torchvision, and the authors' code of RepVGG, RepLKNet, MobileOne and the like.
_FOLDING = re.compile(
    r"fuse(_(model|convs?|bn|conv_?bn|repvgg_block))?|reparam(eteri[sz]e)?|structural_reparam"
    r"|switch_to_deploy|convert_to_deploy|repvgg_convert|merge_(kernel|bn|dilated_branches)"
)

WHY = "the output does not scale with the weight, so batch normalisation cannot be folded into it"

# Two filters count as parallel up to this relative difference, which rounding to bfloat16 causes.
_PARALLEL = 2.0**-6


def _refuses(part: nn.Module) -> bool:
    """Whether a module is a decoupled layer into which nothing can be folded."""
    operator = getattr(part, "operator", None)
    return isinstance(operator, Operator) and not operator.is_plain


def is_rescaled(old: object, new: object) -> bool:
    """Whether a weight is another one, every filter times a number and not all times 1.

    Reads values, so it synchronises a device; parameters are seldom set anew. Tensors of other
    classes than ``nn.Parameter`` (sharded, fake) and on the meta device are not compared.
    """
    if type(old) is not nn.Parameter or type(new) is not nn.Parameter or old is new:
        return False
    if old.shape != new.shape or old.device != new.device or old.is_meta or not old.numel():
        return False
    if old[0].numel() < 2:
        return False  # Filters of one number are always parallel.
    with torch.no_grad():
        before, after = old.detach().flatten(1).double(), new.detach().flatten(1).double()
        squares = before.square().sum(dim=1, keepdim=True)
        scale = (after * before).sum(dim=1, keepdim=True) / squares.clamp(min=1e-300)
        # Comparisons with NaN are false: such weights are no rescaled ones.
        parallel = (after - scale * before).norm(dim=1) <= _PARALLEL * after.norm(dim=1)
        moved = (after - before).norm(dim=1) > _PARALLEL * before.norm(dim=1)
        return bool(parallel.all() & moved.any())


@functools.cache
def _folding_methods(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of a class's methods that fold: by name, and called without arguments."""
    found = []
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        if not _FOLDING.fullmatch(name) or not inspect.isfunction(method):
            continue
        _, *arguments = inspect.signature(method).parameters.values()
        # With arguments of its own it is another thing, such as the fusion of two maps.
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
               for p in arguments):  # fmt: skip
            found.append(name)
    return tuple(found)


class GuardedFolding:
    """A module's folding method, refused as long as it would fold into a decoupled layer."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module = module
        self.method = method

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the method, or raise ValueError where a decoupled layer is among the module's."""
        for name, part in self.module.named_modules():
            if _refuses(part):
                rule = (
                    f"have no decoupled layer for {self.method}() to fold batch normalisation "
                    f"into ({WHY})"
                )
                kind = type(self.module).__name__
                raise checks.value_error("module", rule, f"{kind} with '{name}'")
        return getattr(type(self.module), self.method)(self.module, *arguments, **keywords)


def guard(network: nn.Module) -> None:
    """Guard the folding methods of every module that has a decoupled layer somewhere below.

    Args:
        network: the converted network.
    """
    for module in network.modules():
        kind: Any = type(module)
        methods = _folding_methods(kind)
        if methods and any(_refuses(part) for part in module.modules()):
            for method in methods:
                # On the instance, where libraries that look for the method find it first.
                module.__dict__.setdefault(method, GuardedFolding(module, method))
