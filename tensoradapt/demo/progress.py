"""Progress of the demo: a bar on a terminal, and a plain line per finished run everywhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Log:
    """A bar over all training steps, and lines above it."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Log:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Say on the bar what is being trained now."""
        self._bar.update(self._task, description=what)

    def step(self) -> None:
        """One training step is done."""
        self._bar.advance(self._task)

    def line(self, text: str) -> None:
        """Print a line for good."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
