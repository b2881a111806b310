"""Progress on stderr: a bar on a terminal, plain lines elsewhere.

Invariant: stdout is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
LINES = 10  # so many lines in a file or a pipe, whatever the number of steps


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """A function to report steps to: what was done, how many are done, how many there are."""
    console = Console(stderr=True)
    if quiet:
        yield lambda *_: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name[-40:])
    else:
        yield lambda name, done, total: _line(title, name, done, total)


def _line(title: str, name: str, done: int, total: int) -> None:
    if done == total or done % -(-total // LINES) == 0:
        sys.stderr.write(f"{title}: {done} of {total} ({name})\n")
