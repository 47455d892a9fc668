"""The states of every global random number generator of a process, as plain Python and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from train.engine.files import ContentError


def seed_all(seed: int) -> None:
    """Seed PyTorch on every device, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (augmentation libraries use the global one)
    random.seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators that a training on a device can draw from."""
    version, numbers, gauss = random.getstate()
    words: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = words
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


# Words of the Mersenne Twister that Python and NumPy use, and where in them the next one is.
_WORDS = 624


def _check_words(words: Any, position: Any, whose: str) -> None:
    if not isinstance(position, int) or not 0 <= position <= _WORDS:
        raise ContentError(f"a state of {whose}'s generator at {position!r:.40}")
    if len(words) != _WORDS or not all(
        isinstance(word, int) and not isinstance(word, bool) and 0 <= word < 2**32 for word in words
    ):
        raise ContentError(f"a state of {whose}'s generator that is not {_WORDS} words")


def _check_spare(value: Any, whose: str) -> None:
    """Require the second of a pair of normal numbers, where it was not used yet."""
    if value is not None and not isinstance(value, float):
        raise ContentError(f"a state of {whose}'s generator with {value!r:.40}")


def check_generator(value: Any, example: torch.Tensor, whose: str) -> None:
    """Require the state of a PyTorch generator of the right type and size.

    Raises:
        ContentError: it is another.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise ContentError(f"a state of {whose} generator that is no bytes")
    if value.numel() != example.numel():
        size = f"{value.numel()} bytes, not {example.numel()}"
        raise ContentError(f"a state of {whose} generator of {size}")


def check_rng_state(state: dict[str, Any]) -> None:
    """Require states as :func:`rng_state` returns them.

    Raises:
        ContentError: one is missing, or of another type or size.
    """
    missing = {"torch", "cuda", "python", "numpy"} - set(state)
    if missing:
        raise ContentError(f"no state of {min(missing)}'s generator")
    check_generator(state["torch"], torch.get_rng_state(), "PyTorch's")
    if state["cuda"] is not None and torch.cuda.is_available():
        check_generator(state["cuda"], torch.cuda.get_rng_state(), "CUDA's")
    python, numbers = state["python"], state["numpy"]
    if not isinstance(python, list) or len(python) != 3 or not isinstance(python[1], list):
        raise ContentError("a state of Python's generator that is no list of three")
    if python[0] != random.getstate()[0]:
        raise ContentError(f"a state of Python's generator of version {python[0]!r:.40}")
    _check_words(python[1][:-1], python[1][-1] if python[1] else None, "Python")
    _check_spare(python[2], "Python")
    if not isinstance(numbers, list) or len(numbers) != 5 or numbers[0] != "MT19937":
        raise ContentError("a state of NumPy's generator that is no list of five")
    words = numbers[1]
    if not isinstance(words, torch.Tensor) or words.dtype != torch.int64 or words.dim() != 1:
        raise ContentError("a state of NumPy's generator that is no words")
    _check_words(words.tolist(), numbers[2], "NumPy")
    if numbers[3] not in (0, 1):
        raise ContentError(f"a state of NumPy's generator with {numbers[3]!r:.40}")
    _check_spare(numbers[4], "NumPy")


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back into a state that :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
