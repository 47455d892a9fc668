"""What a run shows while it trains: a bar on a terminal, lines elsewhere, from rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# Seconds between two movements of the bar.
PERIOD = 0.25


def duration(seconds: float) -> str:
    """Return a duration as ``h:mm:ss`` or ``m:ss``.

    Example:
        >>> duration(3725.4), duration(65.0)
        ('1:02:05', '1:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(images_per_second: float) -> str:
    """Return a speed with three digits or all before the point.

    Example:
        >>> rate(1234.56), rate(1.23456)
        ('1,235 images/s', '1.23 images/s')
    """
    digits = 0 if images_per_second >= 100 else 1 if images_per_second >= 10 else 2
    return f"{images_per_second:,.{digits}f} images/s"


class TrainProgress:
    """The progress of one run; ``move`` is cheap enough to be called after every step.

    Args:
        console: where to show it; nothing is shown on a quiet console.
        steps: of the whole run.
        start: steps that were done before.
    """

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self.console = console
        self.steps = steps
        self._next = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._live = console.is_terminal and not console.quiet
        self._speed = ""
        self._text = "training"
        self._task = self._bar.add_task(self._text, total=steps, completed=start, speed="")

    def __enter__(self) -> TrainProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.refresh()
            self._bar.stop()

    def move(self, step: int, now: float) -> None:
        """Show that a step is done, unless the bar has just moved; ``now`` is perf_counter's."""
        if self._live and now >= self._next:
            self._next = now + PERIOD
            self._bar.update(
                self._task, completed=step, description=self._text, speed=self._speed, refresh=True
            )

    def record(self, step: int, loss: float, images_per_second: float, step_seconds: float) -> None:
        """Show the figures of a log interval; a line of them where no bar can be."""
        left = duration((self.steps - step) * step_seconds)
        self._speed = f"{rate(images_per_second)}, {left} left"
        self._text = f"loss {loss:.4f}"
        if self._live:
            self._next = 0.0
            self.move(step, time.perf_counter())
        else:
            self.say(f"step {step}/{self.steps}: loss {loss:.4f}, {self._speed}")

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
