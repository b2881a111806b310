"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` or `~user` in front as that home folder; of a user that there is none of, as it stands."""
    return Path(os.path.expanduser(path))
