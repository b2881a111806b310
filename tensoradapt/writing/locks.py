"""Locks of outputs: one writer at a time, be it a process or a thread.

A lock is the system's own, on a hidden file beside the output: it goes when its process does, whatever ends it, and
between the machines that share a disk it holds as far as that disk's locks do (NFS 4, and NFS 3 with its lock service).
The file goes with the lock. The package `filelock` keeps its files, and where a disk has no locks it takes files that
outlive a killed process for locks; here such a disk has no lock, and nothing is removed on it but by who made it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tensoradapt.errors import FileError
from tensoradapt.writing.hidden import hidden

PAUSE = 0.02  # seconds between two looks at a lock that another holds

if sys.platform == "win32":
    import msvcrt

    def _exclusive(file: IO[bytes]) -> None:
        """Lock a file until it is closed. Raises PermissionError where it is locked already."""
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _exclusive(file: IO[bytes]) -> None:
        """Lock a file until it is closed. Raises BlockingIOError or PermissionError where it is locked already."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path, kind: str, *, wait: float = 0.0) -> Iterator[bool]:
    """Hold an output's lock of a kind; whether there are locks on its disk. Its folder must be there.

    Raises FileError where another process or thread still holds it after `wait` seconds, OSError where nothing can be
    written.
    """
    lock, held = hidden(path, kind), True
    try:
        file = _patiently(lock, path, wait)
    except NotImplementedError:
        file, held = None, False
    try:
        yield held
    finally:
        if file is not None:
            with suppress(OSError):
                lock.unlink()  # before it is released: who opened it meanwhile sees that it is gone
            file.close()


def _patiently(lock: Path, path: Path, wait: float) -> IO[bytes]:
    end = time.monotonic() + wait
    while (file := _taken(lock)) is None:
        if time.monotonic() >= end:
            raise FileError(f"another process is writing {path}", hint="wait for it, or choose another output")
        time.sleep(PAUSE)
    return file


def _taken(lock: Path) -> IO[bytes] | None:
    """The lock's file, locked; None where another has it. Raises NotImplementedError where a disk has no locks."""
    while True:
        file = lock.open("ab")
        try:
            _exclusive(file)
            if _is_there(lock, file):
                return file
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError as error:
            with suppress(OSError):
                lock.unlink()
            file.close()
            raise NotImplementedError(str(error)) from None
        file.close()


def _is_there(lock: Path, file: IO[bytes]) -> bool:
    """Whether a file is the one under the lock's name: its last owner may have removed it since it was opened."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
