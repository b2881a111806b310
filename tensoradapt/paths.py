"""Paths as users write them, and what files may say of them."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tensoradapt.errors import FileError

# An organisation and a name, or one of the hub's old names, which have no organisation and are in lower case.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[a-z0-9][a-z0-9_.-]*")
SNAPSHOT = re.compile(r"(?:^|[/\\])models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[^/\\]+)")
PARTS = ("config.json", "model.safetensors", "model.safetensors.index.json")  # of a model's folder, which has the name


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` or `~user` in front as that home folder; of a user that there is none of, as it stands.

    Raises FileError on what is no path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise FileError("this is no path", got=repr(path)[:80], expected="a string or a Path")
    return Path(os.path.expanduser(path))


def check_regular(file: Path) -> None:
    """Raise FileError where a path is not there, or is no file (a folder, a pipe, a device); nothing is opened."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
        if not os.access(file, os.R_OK):
            raise PermissionError("you have no permission to read it")
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read", got=getattr(error, "strerror", None) or str(error)) from None
    if not regular:
        raise FileError(f"{file} is no file", got="a folder, a pipe or a device", expected="a safetensors file")


class Origin(NamedTuple):
    """Where a model is from, as files may say it: a hub id with its revision, or else the own name of its folder."""

    name: str
    revision: str = ""
    hub: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def origin(source: str | os.PathLike[str]) -> Origin:
    """The origin of a path, of a snapshot in the hub's cache, or of a hub id: what is there as a path is no id.

    Nothing of the machine is in it but a folder's own name, without breaks and what no text file can hold.
    """
    text = os.fspath(source)
    found = SNAPSHOT.search(text)
    if found:
        return Origin(found["id"].replace("--", "/"), found["revision"], hub=True)
    name, _, revision = text.partition("@")
    if HUB_ID.fullmatch(name) and not os.path.lexists(expand(text)):
        return Origin(name, revision, hub=True)
    whole = expand(text) if text else Path()
    with suppress(FileNotFoundError):  # the current folder may be gone
        whole = Path(os.path.abspath(whole)) if text else whole
    own = whole.parent.name if whole.name in PARTS and whole.parent.name else whole.name
    return Origin(" ".join(own.rpartition("\\")[2].encode("utf-8", "replace").decode().split()))
