"""Folders written as a whole: a kill at any moment leaves the old folder, none, or the new one, never half of one.

Invariant: a folder that holds other files than ours is never replaced.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tensoradapt.errors import FileError
from tensoradapt.io.atomic import flush, give_mode, unwritten, usual_mode
from tensoradapt.paths import expand


@contextmanager
def atomic_folder(path: Path, ours: Collection[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends, removed when it fails.

    Raises FileError where `path` exists and is not to be overwritten, or holds files that are not among `ours`.
    """
    path = Path(os.path.abspath(expand(path)))
    check_free(path, ours, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mode = usual_mode(temporary / "mode")
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        _give_modes(temporary, path, mode)
        _swap(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_modes(new: Path, old: Path, mode: int) -> None:
    """Give every file the mode of the one it replaces, or `mode`, and the folders that they lie in likewise."""
    for found in new.rglob("*"):
        usual = stat.S_IMODE(found.stat().st_mode) if found.is_dir() else mode
        give_mode(found, old / found.relative_to(new), usual)
    give_mode(new, old, stat.S_IMODE(new.stat().st_mode))


def check_free(path: Path, ours: Collection[str], *, overwrite: bool) -> None:
    """Raise FileError where a folder is not to be written; before long work, too."""
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise FileError(f"{path} is there already, and is no folder", hint="choose another folder")
    held = sorted(found.name for found in path.iterdir())
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


def _swap(new: Path, path: Path) -> None:
    """Put a folder in the place of another, which comes back where that fails."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
