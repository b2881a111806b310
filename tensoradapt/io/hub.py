"""Models of the local hub cache. Invariant: nothing is downloaded, and the network is not asked."""

from __future__ import annotations

import re
from pathlib import Path

from tensoradapt.errors import FileError


def cached(source: str, revision: str | None, what: str, expected: str) -> tuple[Path, str, str | None]:
    """The folder of a cached model, the name that messages call it by, and its revision.

    `source` is `org/name` or `org/name@revision`. Raises FileError where it is no such id, and where the cache lacks
    it: `what` and `expected` say what was looked for.
    """
    name, at, inline = source.partition("@")
    if at and revision not in (None, inline):
        raise FileError(f"{source} has two revisions", got=f"{inline} and {revision}", hint="give one of them")
    revision = inline if at else revision
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".safetensors", ".json")) or name[0] in "./":
        raise FileError(f"no {what} at {source}", expected=expected, hint="look at the path")
    return _snapshot(name, revision, what), f"{name}@{revision}" if revision else name, revision


def _snapshot(name: str, revision: str | None, what: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise FileError(
            f"no file or folder {name}", hint='a hub id needs huggingface_hub: pip install "tensoradapt[hf]"'
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise FileError(
            f"no {what} at {name}",
            got=f"no such path, and the hub cache has no {name}" + (f" at revision {revision}" if revision else ""),
            hint=("" if "/" in name else "look at the path; or, for a model of the hub, ")
            + f"download it first: hf download {name}"
            + (f" --revision {revision}" if revision else ""),
        ) from None
