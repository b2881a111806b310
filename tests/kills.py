"""Jobs that write, run in forked children that are killed, interrupted, or find the disk full, at a step of their own.

A step is anything that changes the file system below a folder, as Python's audit hooks see it: opening to write,
renaming, removing, making folders; and flushing, and the writer of safetensors, which are no such events.
"""

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tensoradapt.__main__ import main
from tensoradapt.io import native

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.truncate"}
MAKING = {"open", "os.mkdir", "os.link", "write", "flush"}  # what a full disk refuses
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill(what: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(what: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fill(what: str) -> None:
    """From here on there is no room: removing and renaming go on."""
    if what in MAKING:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class Steps:
    """Counts the steps of this process below a folder, and acts at one of them; or, if `on`, from it on."""

    room: str
    act: Callable[[str], None] | None = None
    at: int = 0
    on: bool = False
    seen: list[str] = field(default_factory=list)

    def step(self, what: str) -> None:
        self.seen.append(what)
        if self.act is not None and (len(self.seen) == self.at or (self.on and len(self.seen) > self.at)):
            self.act(what)

    def watch(self) -> None:
        """From now on, for good."""
        sys.addaudithook(self._audit)
        os.fsync = self._before("flush", os.fsync)
        write = self._before("write", native.save_file)

        def save_file(tensors, path, metadata):
            """The writer, and what it leaves beside the file where it is killed."""
            if self.act is kill and len(self.seen) + 1 == self.at:
                Path(path).write_bytes(b"\x10\0\0")
                Path(path).with_name(".tmpAb1cD2").write_bytes(b"\x10\0\0")
            return write(tensors, path, metadata=metadata)

        native.save_file = save_file

    def _before(self, what: str, function):
        def counted(*args, **options):
            self.step(what)
            return function(*args, **options)

        return counted

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITES and self._below(path):
                self.step(event)
        elif event in CHANGES and self._below(args[0]):
            self.step(event)

    def _below(self, path) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(self.room)


@dataclass(frozen=True)
class Ended:
    """How a child ended (a signal as a negative number), what it said on stderr, and the steps it took."""

    code: int
    said: str
    steps: int


def run(job, room: Path, act=None, at: int = 0, *, on=False, limit=None, meanwhile=None) -> Ended:
    """A job, a command's arguments or a function, in a forked child; `meanwhile` is done while it waits at a step."""
    ready, go = os.pipe(), os.pipe()
    if meanwhile is not None:
        act = lambda _: (os.write(ready[1], b"x"), os.read(go[0], 1))  # noqa: E731
    said, counted = room.with_name(f"{room.name}.stderr"), room.with_name(f"{room.name}.steps")
    counted.write_text("")
    child = os.fork()
    if child == 0:
        try:
            _be(job, Steps(f"{room}{os.sep}", act, at, on), said, counted, limit)
        finally:
            os._exit(99)
    os.close(ready[1])  # a child that ended is then the end of the pipe
    try:
        if meanwhile is not None and os.read(ready[0], 1):
            meanwhile()
    finally:
        os.write(go[1], b"x")
        for end in (ready[0], *go):
            os.close(end)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, said.read_text(), len(counted.read_text()))


def _be(job, steps: Steps, said: Path, counted: Path, limit: int | None) -> None:
    signal.alarm(120)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((0, os.devnull), (1, os.devnull), (2, said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    steps.watch()
    code = 1
    try:
        if callable(job):
            job()
            code = 0
        else:
            sys.argv = ["tensoradapt", *job]
            main()
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        counted.write_text("." * len(steps.seen))
        os._exit(code)


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file below a folder, hidden ones too, and its empty folders."""
    found = {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }
    return dict(sorted(found.items()))


def visible(held: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """What a user sees: nothing in or under a hidden name, and no journal."""
    return {
        name: text
        for name, text in held.items()
        if not any(part.startswith(".") or part.endswith(".partial") for part in Path(name).parts)
        and text != b"a folder"
    }
