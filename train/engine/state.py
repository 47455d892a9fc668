"""What a checkpoint's state must be before anything of it is used.

Its digest says that it is what was saved, not that this program saved it. Types and sizes are
checked here; what must fit the network, its optimiser and the data, where these are at hand.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.engine.files import ContentError
from train.engine.rng import check_rng_state

_PARTS: dict[str, type] = {
    "network": dict,
    "optimizer": dict,
    "scaler": dict,
    "task": dict,
    "pending": bool,
    "evaluation": dict,
    "ranks": list,
}


def require(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """Return a value of the type that it must have.

    Raises:
        ContentError: it has another one.

    Example:
        >>> require({"a": 1}, dict, "network")
        {'a': 1}
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(one.__name__ for one in kinds)
        raise ContentError(f"{what} of type {type(value).__name__}, not {names}")
    return value


def count(value: Any, what: str) -> int:
    """Return a whole number from 0 on.

    Raises:
        ContentError: it is none.
    """
    number: int = require(value, int, what)
    if number < 0:
        raise ContentError(f"{what} {number}")
    return number


def part(value: Mapping[Any, Any], name: str, kind: type | tuple[type, ...], what: str) -> Any:
    """Return an entry of a mapping, of the type that it must have.

    Raises:
        ContentError: it is missing, or has another one.
    """
    if name not in value:
        raise ContentError(f"{what} without '{name}'")
    return require(value[name], kind, f"{what}'s '{name}'")


def check_state(state: Any, step: int) -> None:
    """Require a state to be one that the engine saves after so many steps.

    Raises:
        ContentError: it is not; the message says where.
    """
    require(state, dict, "a state")
    for name, kind in _PARTS.items():
        part(state, name, kind, "a state")
    if count(part(state, "step", int, "a state"), "a step") != step:
        raise ContentError(f"step {state['step']}, listed as {step}")
    require(state.get("optimizer_kind", ""), str, "the optimiser's name")
    for name in state["network"]:
        require(name, str, "a name in the network")
    for name, value in state["evaluation"].items():
        require(name, str, "a name in the evaluation")
        require(value, (int, float), f"the evaluation's '{name}'")
    entries = state.get("optimizer_entries")
    if entries is not None:
        count(entries, "a number of entries")
    _check_optimizer(state["optimizer"], entries)
    if not state["ranks"]:
        raise ContentError("no process")
    for rank in state["ranks"]:
        require(rank, dict, "a process")
        part(rank, "stream", dict, "a process")
        check_rng_state(part(rank, "rng", dict, "a process"))
        _check_interval(part(rank, "interval", dict, "a process"))


def _check_optimizer(state: dict[Any, Any], entries: int | None) -> None:
    found = part(state, "state", dict, "the optimiser")
    if entries is not None and len(found) != entries:
        raise ContentError(f"an optimiser with {len(found)} of {entries} entries")
    for number, entry in found.items():
        count(number, "a parameter's number")
        require(entry, dict, "a parameter's entry")
    for group in part(state, "param_groups", list, "the optimiser"):
        require(group, dict, "a group of parameters")
        for number in part(group, "params", list, "a group of parameters"):
            count(number, "a parameter's number")


def _check_interval(state: dict[Any, Any]) -> None:
    names = part(state, "names", list, "the log's sums")
    sums = part(state, "sums", list, "the log's sums")
    count(part(state, "batches", int, "the log's sums"), "a number of batches")
    for name in names:
        require(name, str, "a name in the log's sums")
    for value in sums:
        if require(value, Tensor, "a sum").shape != () or not value.is_floating_point():
            raise ContentError(f"a sum of shape {list(value.shape)} and type {value.dtype}")
    if sums and (len(sums) != len(names) or state["batches"] < 1):
        raise ContentError(f"{len(sums)} sums of {len(names)} names")


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Require an optimiser's saved state to have what its next step reads, of the right shapes.

    What that is, a step on a number shows. A parameter that was never stepped has no entry.

    Raises:
        ContentError: an entry is missing or of another shape.
    """
    saved = state["param_groups"]
    groups = optimizer.param_groups
    if len(saved) != len(groups):
        raise ContentError(f"{len(saved)} groups of parameters, not {len(groups)}")
    for group, own in zip(saved, groups, strict=True):
        if len(group["params"]) != len(own["params"]):
            raise ContentError(f"a group of {len(group['params'])}, not {len(own['params'])}")
        for name in own.keys() & group.keys() - {"params"}:
            # What is not given may be decided anew.
            if own[name] is not None and group[name] is not None:
                require_like(group[name], own[name], f"the optimiser's '{name}'")
        wanted = _entries(optimizer, own)
        for number, parameter in zip(group["params"], own["params"], strict=True):
            entry = state["state"].get(number)
            if entry is None:
                continue
            for name, example in wanted.items():
                if name not in entry:
                    raise ContentError(f"an optimiser without '{name}' of parameter {number}")
                value = entry[name]
                if isinstance(example, Tensor):
                    # One number per element, or one for all.
                    shape = parameter.shape if example.dim() else example.shape
                    if require(value, Tensor, f"the optimiser's '{name}'").shape != shape:
                        raise ContentError(
                            f"the optimiser's '{name}' of shape {list(value.shape)}, "
                            f"not {list(shape)}"
                        )
                elif value is not None:
                    require(value, type(example), f"the optimiser's '{name}'")


def _entries(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimiser keeps for a parameter of a group after a step."""
    first = group["params"][0]
    tiny = torch.zeros(1, dtype=first.dtype, device=first.device, requires_grad=True)
    tiny.grad = torch.zeros_like(tiny)
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**group, "params": [tiny]}]
    probe.step()
    return dict(probe.state[tiny])


def require_like(value: Any, example: Any, what: str) -> None:
    """Require a value made of the same keys and types as an example, to any depth.

    Raises:
        ContentError: it is not.

    Example:
        >>> require_like({"a": [1, 2.0]}, {"a": [3, 4.0]}, "schedule")
    """
    if isinstance(example, (bool, str)) or example is None:
        require(value, type(example), what)
    elif isinstance(example, (int, float)):
        require(value, (int, float) if isinstance(example, float) else int, what)
    elif isinstance(example, Mapping):
        require(value, dict, what)
        if value.keys() != example.keys():
            other = sorted(map(str, value.keys() ^ example.keys()))
            raise ContentError(f"{what} with a difference in '{other[0]}'")
        for name in example:
            require_like(value[name], example[name], f"{what}'s '{name}'")
    elif isinstance(example, Sequence):
        require(value, (list, tuple), what)
        if len(value) != len(example):
            raise ContentError(f"{what} of length {len(value)}, not {len(example)}")
        for item, other in zip(value, example, strict=True):
            require_like(item, other, what)
    else:
        raise TypeError(f"{what} of type {type(example).__name__}")
