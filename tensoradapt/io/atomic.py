"""Atomic writing: a kill at any moment leaves the old file or the new one, never half of one.

Invariant: what is written may be read by those who may read the file it replaces, or any new file of its user
(safetensors and `tempfile` keep theirs to the user alone).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensoradapt.errors import FileError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: flushed and renamed over it when the block ends, removed when it fails."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = usual_mode(temporary)
        yield temporary
        flush(temporary)
        give_mode(temporary, path, mode)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):  # where there is none, or no folder either
            temporary.unlink()


def usual_mode(unused: Path) -> int:
    """The mode of a new file at a path: the user's mask decides, and the folder's rules where it has any."""
    unused.unlink(missing_ok=True)
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


def unwritten(path: Path, error: OSError) -> FileError:
    """What to say of a path that cannot be written."""
    return FileError(
        f"{path} cannot be written",
        got=error.strerror or str(error),
        hint="choose another folder, or free some space",
    )


def flush(path: Path) -> None:
    """Force a file's, or a folder's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
