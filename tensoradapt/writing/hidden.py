"""The hidden names beside an output under which it is made, and what killed processes leave under them.

Invariant: a name is drawn anew for every write, as numbers of processes are not unique among machines and containers
that share a disk; and nothing is removed whose name is not wholly of this kind.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensoradapt.errors import FileError

LOCK, FILE_LOCK = "lock", "tmp-lock"
FILE, NEW, READY, OLD = "tmp", "new", "ready", "old"  # a file at work, a folder, one that is to be moved, one replaced
TOKEN = r"(?:[0-9a-f]{16}|\d{1,10})"  # digits alone: versions that took the process's number
LEFT = re.compile(rf"\.(?P<of>.+)\.(?:{LOCK}|{FILE_LOCK}|(?:{FILE}|{NEW}|{READY}|{OLD})-{TOKEN})")
LONGEST = 200  # bytes of a name that a system lets grow by a few


def whole(path: Path) -> Path:
    """An output's absolute path, which has a name. Raises FileError on the root of a file system.

    So it does on a relative path where the current folder is gone.
    """
    try:
        path = Path(os.path.abspath(path)) if path.name in ("", "..") else path.absolute()
    except OSError as error:
        raise unwritten(path, error) from None
    if not path.name:
        raise FileError(f"{path} is the root of a file system", expected="a path of the output's own")
    return path


def hidden(path: Path, kind: str) -> Path:
    """The hidden path of a kind beside an output."""
    return path.with_name(f".{_short(path.name)}.{kind}")


def _short(name: str) -> str:
    """A name that a system lets grow."""
    whole = os.fsencode(name)
    return name if len(whole) <= LONGEST else hashlib.sha256(whole).hexdigest()


def fresh(path: Path, kind: str) -> Path:
    """A hidden path of a kind that nobody else has."""
    return hidden(path, f"{kind}-{secrets.token_hex(8)}")


def is_leftover(name: str, of: Iterable[str]) -> bool:
    """Whether a name is one under which one `of` these is made, or was until that was killed."""
    made = stands_for(name)
    return made is not None and made in map(_short, of)


def stands_for(name: str) -> str | None:
    """The name, as it stands in a hidden one, of what is made under that; None where a name is no such hidden one."""
    found = LEFT.fullmatch(name)
    return None if found is None else found["of"]


def leftovers(path: Path, kind: str) -> list[Path]:
    """What lies beside an output under hidden names of a kind."""
    pattern = re.compile(rf"{re.escape(hidden(path, kind).name)}-{TOKEN}")
    with suppress(OSError):  # no folder, or none that may be listed
        return [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)]
    return []


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def staged(path: Path, kind: str) -> Iterator[Path]:
    """A new folder under a hidden name, removed with what is left in it when the block ends."""
    folder = fresh(path, kind)
    try:
        folder.mkdir()
        yield folder
    finally:
        remove(folder)


@contextmanager
def with_parents(path: Path) -> Iterator[None]:
    """The folders above a path, made where there are none; those that are still empty at the end go again."""
    made = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def unwritten(path: Path, error: OSError) -> FileError:
    """What to say of a path that cannot be written."""
    return FileError(
        f"{path} cannot be written",
        got=error.strerror or str(error),
        hint="choose another folder, or free some space",
    )
