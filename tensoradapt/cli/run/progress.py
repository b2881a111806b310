"""Progress on stderr: a bar on a terminal, plain lines elsewhere, the first within two seconds.

Invariant: stdout is left alone; work that is done within a second says nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]  # the item at work or just done, how many are done, how many there are
FIRST, EVERY = 1.0, 5.0  # seconds to the first line, and between two


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """A function to report steps to: the item, how many are done, how many there are."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bar(title) as tell:
            yield tell
    else:
        with _lines(title) as tell:
            yield tell


@dataclass(frozen=True)
class Steps:
    """How far a run of steps is: the item, those done and all, when it began, and how many were done then."""

    begun: float
    item: str = ""
    done: int = 0
    total: int = 0
    before: int = 0

    def then(self, item: str, done: int, total: int, now: float) -> Steps:
        """The next step: of this run, or of a new one where the numbers begin again."""
        if self.goes_on(done, total):
            return replace(self, item=item, done=done)
        begun = self.begun if not self.total else now  # the first run began before its first step
        return Steps(begun, item, done, total, before=max(0, done - 1))

    def goes_on(self, done: int, total: int) -> bool:
        """Whether a step belongs to this run."""
        return total == self.total and done >= self.done

    def left(self, now: float) -> float | None:
        """An estimate of the seconds left; None before a step is done."""
        fresh = self.done - self.before
        return (now - self.begun) / fresh * (self.total - self.done) if fresh > 0 else None

    def line(self, now: float) -> str:
        """What is at work, how far it is, and how long it will take."""
        if not self.total:
            return f"reading, {span(now - self.begun)} so far"
        left = self.left(now)
        estimate = f", about {span(left)} left" if left else ""
        return f"{self.done} of {self.total} ({self.item}){estimate}"


def span(seconds: float) -> str:
    """A time for people: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    large, small, units = (
        (whole // 60, whole % 60, "min s") if whole < 3600 else (whole // 3600, whole // 60 % 60, "h min")
    )
    one, two = units.split()
    return f"{large} {one} {small} {two}" if small else f"{large} {one}"


def _say(text: str) -> None:
    with suppress(OSError):  # nobody hears it
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextmanager
def _lines(title: str) -> Iterator[Report]:
    """Lines from a thread of their own, so that one long step is seen to be at work too."""
    start = time.monotonic()
    state = [Steps(start)]
    over, said = Event(), Event()

    def tell(item: str, done: int, total: int) -> None:
        state[0] = state[0].then(item, done, total, time.monotonic())

    def speak() -> None:
        wait = FIRST
        while not over.wait(wait):
            _say(f"{title}: {state[0].line(time.monotonic())}")
            said.set()
            wait = EVERY

    thread = Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield tell
        over.set()
        thread.join()
        if said.is_set():
            _say(f"{title}: done in {span(time.monotonic() - start)}")
    finally:
        over.set()


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    spinner = "dots" if (sys.stderr.encoding or "").lower().startswith("utf") else "line"
    said = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(spinner), said, BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        state = [Steps(0.0)]

        def tell(item: str, done: int, total: int) -> None:
            if not state[0].goes_on(done, total):
                bar.reset(task, total=total)
            state[0] = state[0].then(item, done, total, 0.0)
            bar.update(task, completed=done, total=total, description=f"{title} {item[-24:]}")

        yield tell
