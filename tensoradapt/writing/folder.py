"""Folders written as a whole: a kill at any moment leaves the old folder or the new one, never half of one.

Invariant: a folder that holds other files than ours is never replaced; who writes one has claimed it, and finds what
others left who were killed put right.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tensoradapt.errors import FileError
from tensoradapt.paths import expand
from tensoradapt.writing.atomic import flush, give_mode, usual_mode
from tensoradapt.writing.hidden import (
    FILE,
    LOCK,
    NEW,
    OLD,
    READY,
    fresh,
    is_leftover,
    leftovers,
    remove,
    staged,
    unwritten,
    whole,
    with_parents,
)
from tensoradapt.writing.locks import locked

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
AT_HERE, EXCHANGE = -100, 2  # of the system call renameat2


@contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """An output that is this block's alone, for the whole of its work. What killed processes left there is put right.

    Raises FileError where another process or thread has claimed it, or nothing can be written there.
    """
    path = whole(expand(out))
    with ExitStack() as stack:
        try:
            stack.enter_context(with_parents(path))
            if stack.enter_context(_lock(path)):
                _put_right(path)
        except OSError as error:
            raise unwritten(path, error) from error
        yield


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """The lock beside an output; within a folder beside which nothing can be written, as one that is mounted."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(locked(path, LOCK))
        except OSError as error:
            if error.errno not in READ_ONLY or not path.is_dir():
                raise
            held = stack.enter_context(locked(within(path), LOCK))
        yield held


def within(folder: Path) -> Path:
    """The path in a folder whose hidden names are the folder's own."""
    return folder / folder.name


def _put_right(path: Path) -> None:
    """Finish what was to be moved, bring back what was to be replaced, and remove what else killed writers left."""
    for old in leftovers(path, OLD):
        if not os.path.lexists(path):
            os.replace(old, path)
    for ready in leftovers(within(path), READY):
        move_into(ready, path)
    for place in (path, within(path)):
        for left in (found for kind in (NEW, OLD) for found in leftovers(place, kind)):
            remove(left)
    for left in leftovers(path, FILE):  # a folder of an earlier version
        if left.is_dir() and left.name.rpartition("-")[2].isdecimal():
            remove(left)


@contextmanager
def atomic_folder(path: str | Path, ours: Collection[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, put in its place when the block ends, removed when it fails.

    What it holds is moved into a folder that has to stay, as `files_into` does. Raises FileError where `path` exists
    and is not to be overwritten, or holds files that are not among `ours`.
    """
    path = whole(expand(path))
    check_free(path, ours, overwrite=overwrite)
    try:
        stays = _stays(path)
        with staged(within(path) if stays else path, NEW) as temporary:
            mode = usual_mode(temporary / "mode")
            yield temporary
            settle(temporary, path, mode)
            check_free(path, ours, overwrite=overwrite)  # where a disk has no locks, another may have written it
            (_move_all if stays else _swap)(temporary, path)
            flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def _stays(path: Path) -> bool:
    """Whether a folder cannot be replaced: a mounted one, the current one, one beside which nothing can be written."""
    if not path.is_dir():
        return False
    return path.is_mount() or path.samefile(os.curdir) or not os.access(path.parent, os.W_OK | os.X_OK)


@contextmanager
def files_into(out: str | Path) -> Iterator[Path]:
    """A temporary folder whose files go to the folder `out` together when the block ends; none does where it fails.

    A kill while they go leaves each of them old or new; who claims the folder next moves the rest. Raises FileError.
    """
    path = whole(expand(out))
    try:
        place = within(path) if os.path.lexists(path) else path
        with staged(place, NEW) as temporary:
            mode = usual_mode(temporary / "mode")
            yield temporary
            settle(temporary, path, mode)
            if place == path:
                os.replace(temporary, path)
            else:
                _move_all(temporary, path)
            flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def _check_places(new: Path, path: Path) -> None:
    """Raise FileError where a folder stands in the place of a file."""
    for file in new.iterdir():
        if (path / file.name).is_dir() and not file.is_dir():
            raise FileError(
                f"{path / file.name} is a folder", expected="a file, or nothing", hint="choose another folder"
            )


def _move_all(new: Path, folder: Path) -> None:
    """Move what a folder within another holds there, and the rest all the same where an interruption comes between."""
    _check_places(new, folder)
    os.replace(new, ready := fresh(within(folder), READY))
    try:
        move_into(ready, folder)
    except BaseException:
        move_into(ready, folder)
        raise
    flush(folder)


def move_into(ready: Path, folder: Path) -> None:
    """Move the files and folders of one folder to another, and remove it."""
    for found in sorted(ready.iterdir()) if ready.exists() else ():
        if found.is_dir():
            remove(folder / found.name)
        os.replace(found, folder / found.name)
    remove(ready)


def settle(new: Path, old: Path, mode: int) -> None:
    """Flush a folder, and give every file the mode of the one it replaces, or `mode`; folders likewise."""
    for found in new.rglob("*"):
        usual = stat.S_IMODE(found.stat().st_mode) if found.is_dir() else mode
        give_mode(found, old / found.relative_to(new), usual)
        flush(found)
    give_mode(new, old, stat.S_IMODE(new.stat().st_mode))
    flush(new)


def check_free(path: Path, ours: Collection[str], *, overwrite: bool) -> None:
    """Raise FileError where a folder is not to be written; before long work, too."""
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise FileError(f"{path} is there already, and is no folder", hint="choose another folder")
    held = sorted(found.name for found in path.iterdir() if not is_leftover(found.name, {path.name, *ours}))
    foreign = [name for name in held if name not in ours]
    if foreign:
        raise FileError(
            f"{path} holds other files, which would be lost",
            got=", ".join(foreign[:5]),
            expected=f"nothing but {', '.join(sorted(ours))}",
            hint="choose another folder",
        )
    if held and not overwrite:
        raise FileError(
            f"{path} is there already", got=", ".join(held), hint="choose another folder, or overwrite=True"
        )
    for place in (path, *path.rglob("*")):  # what cannot be emptied would stay, under a hidden name
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise FileError(f"{place} cannot be written", got="it is read-only", hint="choose another folder")


def _swap(new: Path, path: Path) -> None:
    """Put a folder in the place of another: in one step where the system can, else the other comes back on failure."""
    if not os.path.lexists(path):
        return os.replace(new, path)
    if exchanged(new, path):
        return None
    old = fresh(path, OLD)
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if not os.path.lexists(path) and os.path.lexists(old):
            os.replace(old, path)
        raise
    return remove(old)


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; whether the system and the disk could."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(AT_HERE, os.fsencode(one), AT_HERE, os.fsencode(other), EXCHANGE) == 0
