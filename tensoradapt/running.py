"""Running: which calls run now, in which thread, told by the stack itself.

A call that an exception or Ctrl-C ended is not on the stack any more, whatever was left undone of its end.
Invariant: nothing here keeps a call alive, or makes another thread wait.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


def runs(frame: object, above: FrameType | None = None) -> bool:
    """Whether a frame is on the stack of this thread, or on the one whose innermost frame is given."""
    each = above or sys._getframe(1)
    while each is not frame and each.f_back is not None:
        each = each.f_back
    return each is frame


class Running(dict[int, list[Item]], Generic[Item]):
    """Calls by thread, the innermost last; every thread changes its own list. A copy of it has none."""

    def __init__(self, frame_of: Callable[[Item], object]) -> None:
        super().__init__()
        self.frame_of = frame_of

    def __reduce__(self) -> Any:
        return type(self), (self.frame_of,)

    def here(self) -> list[Item]:
        """Those of this thread that were entered and not left, ended ones too."""
        return self.setdefault(threading.get_ident(), [])

    @property
    def anywhere(self) -> bool:
        """Whether a call runs now, in this thread or in another one."""
        tops = sys._current_frames()
        threads = [(tops.get(thread), calls) for thread, calls in [*self.items()]]
        return any(top is not None and runs(self.frame_of(call), top) for top, calls in threads for call in [*calls])


class Lock:
    """A lock of one thread, which may take it again: `with lock.held`. A copy of it is free.

    What Python's own lock does at the end of a block, no interrupt comes before.
    """

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> Any:
        return type(self), ()
