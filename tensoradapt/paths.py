"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from tensoradapt.errors import FileError


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` or `~user` in front as that home folder; of a user that there is none of, as it stands.

    Raises FileError on what is no path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise FileError("this is no path", got=repr(path)[:80], expected="a string or a Path")
    return Path(os.path.expanduser(path))
