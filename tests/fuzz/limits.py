"""What an input may cost and do: CPU seconds, memory, and nothing executed, connected to or written elsewhere.

An audit hook cannot be taken away again, so there is one for the process, which judges only while an input is tried.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

SECONDS = 2.0  # of CPU for one input
MEGABYTES = 300  # more than before it, at any moment
STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.")
REACHES = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.bind", "socket.send", "urllib.")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
RUNS = ("exec", "compile")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """The input took more than its seconds; no `except Exception` of a reader stops it."""


@dataclass
class Watch:
    """What is allowed while one input is tried, and what was done besides."""

    folder: str = ""
    written: bool = False  # whether the reader may write into the input's folder
    done: list[str] = field(default_factory=list)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Judge one event of the interpreter."""
        if event.startswith(STARTS + REACHES) or event == "pickle.find_class":
            self.done.append(f"{event} {arguments!r:.200}")
        elif event in RUNS and self._is_theirs(event, arguments):
            self.done.append(f"{event} {arguments!r:.200}")
        elif event.startswith(CHANGES) or (event == "open" and len(arguments) > 2 and _writes(arguments)):
            if not self._may_write(_whole(arguments)):
                self.done.append(f"{event} {arguments!r:.200}")

    def _is_theirs(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Whether code that is compiled or run comes from the input's folder."""
        where = arguments[0].co_filename if isinstance(arguments[0], CodeType) else arguments[-1]
        return isinstance(where, str | bytes) and os.fsdecode(where).startswith(self.folder)

    def _may_write(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a file that is open already
        place = os.path.abspath(os.fsdecode(path))
        mine = self.written and f"{place}{os.sep}".startswith(self.folder)
        return mine or place == os.devnull or place.endswith(".pyc") or "__pycache__" in place


def _whole(arguments: tuple[Any, ...]) -> Any:
    """The path of an event, with the folder that it is relative to where that is open."""
    path, folder = arguments[0], arguments[-1]
    if isinstance(path, str) and not os.path.isabs(path) and type(folder) is int and folder > 2:
        return os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), path)
    return path


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return bool(flags & WRITES) if isinstance(flags, int) else isinstance(mode, str) and bool(set(mode) & set("wax+"))


_WATCHING: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _WATCHING:
        watch.see(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path, *, written: bool = False, seconds: float = SECONDS) -> Iterator[Watch]:
    """Try an input that lies in a folder: `Hang` after some seconds of CPU; what else was done stands in the watch."""
    watch = Watch(f"{folder.resolve()}{os.sep}", written)

    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds:g} s of CPU")

    before = signal.signal(signal.SIGPROF, ring)
    resident = _memory("VmRSS")
    _forget_peak()
    _WATCHING.append(watch)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)  # again: the first may fall into a finally that goes on
    try:
        yield watch
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _WATCHING.remove(watch)
        signal.signal(signal.SIGPROF, before)
        grown = (_memory("VmHWM") - resident) / 1024
        if grown > MEGABYTES:
            watch.done.append(f"took {grown:.0f} MB of memory")


def _memory(name: str) -> int:
    """A line of this process's status, in kB: what it holds, or the most that it held; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _forget_peak() -> None:
    """Let the peak begin at what is held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        pass


def held() -> float:
    """The megabytes that this process holds."""
    return _memory("VmRSS") / 1024
