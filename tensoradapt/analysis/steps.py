"""Steps: what a caller is told of long work, by the item at work and how many are done.

Invariant: the number of steps done never falls, and ends at their total.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]  # the item at work, how many steps are done, how many there are
OFTEN = 1.0  # seconds between two words on one item


@dataclass
class Steps:
    """Calls a progress function when an item begins and ends, and now and then while it goes on."""

    progress: Progress | None
    total: int
    done: int = 0
    item: str = ""
    told: float = 0.0

    def begin(self, item: str) -> None:
        """An item begins."""
        self.item = item
        self._tell()

    def end(self, item: str, count: int = 1) -> None:
        """An item of so many steps is done."""
        self.item, self.done = item, min(self.total, self.done + count)
        self._tell()

    def reach(self, done: int) -> None:
        """So many steps are done, by whomever."""
        self.done = max(self.done, done)

    def tick(self, part: str = "") -> None:
        """The item goes on, with a part of it."""
        if time.monotonic() - self.told >= OFTEN:
            self._tell(f"{self.item}: {part}" if part else self.item)

    def _tell(self, what: str = "") -> None:
        self.told = time.monotonic()
        if self.progress is not None:
            self.progress(what or self.item, self.done, self.total)
