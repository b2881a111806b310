"""Two checkpoints with what their config says: the stream of deltas that analysis and extraction read.

Invariant: a config adds layouts, kinds and heads; without one, or without transformers, names and shapes decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from tensoradapt.errors import FileError, SpecError
from tensoradapt.io.checkpoint import Checkpoint, open_checkpoint
from tensoradapt.io.pairs import Deltas, open_deltas
from tensoradapt.scan import config_in, scan
from tensoradapt.sites import SiteMap

READING = ("rows", "nonfinite", "prefix", "model", "base_revision", "tuned_revision")


def known(given: Iterable[str], options: Sequence[str]) -> None:
    """Raise SpecError on an option that does not exist, naming those that do."""
    for name in given:
        if name not in options:
            close = get_close_matches(name, options, n=1)
            hint = f"did you mean {close[0]}?" if close else None
            raise SpecError(f"there is no option {name!r}", expected=", ".join(options), hint=hint)


def open_source(
    base: Any, tuned: Any, *, base_revision: str | None = None, tuned_revision: str | None = None, **options: Any
) -> Deltas:
    """The differences of two checkpoints; the model is built (on the meta device) from the config beside one of them.

    `options` are those of `open_deltas`: `rows`, `nonfinite`, `prefix`, and `model`, a SiteMap in the config's place.
    Raises FileError.
    """
    sides = (
        _named(open_checkpoint(base, base_revision), "the base"),
        _named(open_checkpoint(tuned, tuned_revision), "the tuned side"),
    )
    module = next((side for side in (tuned, base) if isinstance(side, nn.Module)), None)
    if module is not None and options.get("model") is None:  # it tells more of its weights than their names do
        options["model"] = replace(scan(module), name=sides[0].label)
    if options.get("model") is not None:
        return open_deltas(*sides, **options)
    model, note = described(*sides)
    found = open_deltas(*sides, **{**options, "model": model})
    return replace(found, match=replace(found.match, notes=(*found.match.notes, note))) if note else found


def _named(side: Checkpoint, role: str) -> Checkpoint:
    """A checkpoint that came without a name of its own, called by its part in the comparison."""
    return side if side.label else replace(side, name=f"{role} ({side.name.removeprefix('the ')})")


def described(base: Checkpoint, tuned: Checkpoint) -> tuple[SiteMap | None, str]:
    """What the config of the tuned side, or else of the base, says of the sites; a note where it cannot be used."""
    folders = [side.folder for side in (tuned, base) if side.folder is not None]
    folder = next((folder for folder in folders if config_in(folder) is not None), None)
    if folder is None:
        return None, ""
    try:
        return scan(folder), ""
    except FileError as error:
        return None, f"layouts are judged by name: {next(iter(str(error).splitlines()))}"
