"""Atomic writing: a kill at any moment leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
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
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):  # where there is none, or no folder either
            temporary.unlink()


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
