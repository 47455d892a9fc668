"""One process or many: who this one is, and what all of them agree on.

Every function also works where no process group was started; it then speaks for one process.
"""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dcconv.operator.checks import choice, value_error

DEVICES = ("auto", "cpu", "cuda")


def active() -> bool:
    """Whether a process group was started."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number among all, from 0."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_device(name: str) -> torch.device:
    """Return the device of this process for ``auto``, ``cpu`` or ``cuda``."""
    choice("device", name, DEVICES)
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if name == "cuda":
            raise value_error("device", "be cpu or auto where PyTorch sees no GPU", "'cuda'")
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank() >= gpus:
        rule = f"have a GPU for every process of this machine, which has {gpus}"
        raise value_error("device", rule, f"process {local_rank()}")
    return torch.device("cuda", local_rank())


@contextmanager
def started(name: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Args:
        name: ``auto``, ``cpu`` (gloo) or ``cuda`` (NCCL, one GPU per process).
    """
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or active():
        yield device
        return
    _start_group(device)
    try:
        yield device
    finally:
        forget()
        dist.destroy_process_group()


def forget() -> None:
    """Drop what nobody names any more, where processes were started together.

    What still knows the group, such as DistributedDataParallel in a cycle of references, keeps its
    threads alive. One that drops a Python object while the interpreter ends is ended inside C++,
    and with it the process: "terminate called without an active exception".
    """
    if "RANK" in os.environ:
        gc.collect()


def _start_group(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, device_id=bound)
        return
    # torchrun keeps its store when it restarts the processes, with the addresses of those that
    # died (pytorch issue 135712). On one machine the count of restarts tells them apart; on many
    # each agent has its own count.
    store, own_rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own_store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=own_store,
        rank=own_rank,
        world_size=world,
        device_id=bound,
    )


def _device() -> torch.device:
    """Return where tensors must be for the process group to combine them."""
    return (
        torch.device("cuda", local_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")
    )


def sums(values: Tensor) -> Tensor:
    """Return the sum over processes of a tensor, in place where possible."""
    if world_size() == 1:
        return values
    shared = values.detach().to(_device())
    dist.all_reduce(shared)
    return shared.to(values.device)


def means(values: Tensor) -> Tensor:
    """Return the mean over processes of a tensor."""
    return sums(values) / world_size() if world_size() > 1 else values


def largest(value: int) -> int:
    """Return the largest of the processes' integers."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=_device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def _to_bytes(value: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def gather(value: Any) -> list[Any]:
    """Return every process's value in the order of ranks: tensors and plain Python only."""
    if world_size() == 1:
        return [value]
    data = _to_bytes(value)
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=_device())
    sizes[rank()] = data.numel()
    dist.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded, device=_device()) for _ in range(world_size())]
    dist.all_gather(parts, padded.to(_device()))
    counts: Sequence[int] = sizes.tolist()
    return [_from_bytes(part[:size].cpu()) for part, size in zip(parts, counts, strict=True)]


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every process: tensors and plain Python only."""
    if world_size() == 1:
        return value
    data = _to_bytes(value) if is_main() else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor(data.numel(), device=_device())
    dist.broadcast(size, 0)
    shared = (
        data.to(_device())
        if is_main()
        else torch.empty(int(size), dtype=torch.uint8, device=_device())
    )
    dist.broadcast(shared, 0)
    return _from_bytes(shared.cpu())
