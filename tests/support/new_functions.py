"""A magnitude and an angular function that no kernel has, registered as a user would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dcconv.operator import functions


def register() -> None:
    """Add ``fraction``, a saturating magnitude with a radius, and ``cubic``, odd from -1 to 1."""

    @functions.magnitude("alpha * b / (b + rho)", rho=True)
    def fraction(b: Tensor, rho: Tensor | None, alpha: float, beta: float) -> Tensor:
        assert rho is not None
        return alpha * b / (b + rho)

    @functions.angular("(c + c * c * c) / 2")
    def cubic_angle(c: Tensor, k: Tensor | None, power: float, delta: float) -> Tensor:
        return 0.5 * c * (1.0 + c * c)


@contextmanager
def registered() -> Iterator[None]:
    """Have both inside the context."""
    register()
    try:
        yield
    finally:
        del functions.magnitudes["fraction"], functions.angulars["cubic"]
