"""Atomic writing: a kill at any moment leaves the old file or the new one, never half of one.

Invariant: what is written may be read by those who may read the file it replaces, or any new file of its user
(safetensors and `tempfile` keep theirs to the user alone).
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensoradapt.errors import FileError
from tensoradapt.writing.hidden import FILE, FILE_LOCK, leftovers, remove, staged, unwritten, whole, with_parents
from tensoradapt.writing.locks import locked

FLUSHES_NONE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of folders: shares of other systems, file systems in FUSE
PROCESSES = Path("/proc")  # /dev/stdout leads there
PATIENCE = 600.0  # seconds that one who writes a file waits for another: the last to come is the one that stays


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path of the same name: flushed and renamed over `path` when the block ends, removed when it fails.

    It lies in a hidden folder of its own, as who writes it may write beside it. Raises FileError.
    """
    path = whole(path)
    _check_regular(path)
    try:
        with with_parents(path), locked(path, FILE_LOCK, wait=PATIENCE) as alone:
            for left in leftovers(path, FILE) if alone else ():
                remove(left)
            with staged(path, FILE) as folder:
                temporary = folder / path.name
                mode = usual_mode(temporary)
                yield temporary
                flush(temporary)
                give_mode(temporary, path, mode)
                os.replace(temporary, path)
                flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def _check_regular(path: Path) -> None:
    """Raise FileError where a device, a pipe or a socket would be replaced, or a link to what a process has open."""
    with suppress(OSError):
        if not stat.S_ISREG(kind := path.stat().st_mode) and not stat.S_ISDIR(kind):
            raise FileError(f"{path} is a device or a pipe, which would be replaced", hint="choose another path")
    with suppress(OSError):
        if PROCESSES in Path(os.readlink(path)).parents or PROCESSES in path.parent.resolve().parents:
            raise FileError(f"{path} is what a process has open, not a file's name", hint="choose another path")


def usual_mode(unused: Path) -> int:
    """The mode of a new file at a path: the user's mask decides, and the folder's rules where it has any."""
    unused.touch()
    mode = stat.S_IMODE(unused.stat().st_mode)
    unused.unlink()
    return mode


def give_mode(new: Path, old: Path, mode: int) -> None:
    """Give a path the mode of what it replaces, or `mode` where it replaces nothing."""
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(old.stat().st_mode)
    if mode != stat.S_IMODE(new.stat().st_mode):  # some file systems have no modes to change
        new.chmod(mode)


def flush(path: Path) -> None:
    """Force a file's contents to the disk, and a folder's where its file system does that."""
    folder = path.is_dir()
    if sys.platform == "win32" and folder:  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in FLUSHES_NONE:
            raise
    finally:
        os.close(descriptor)
