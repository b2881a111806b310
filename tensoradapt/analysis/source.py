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
from tensoradapt.io.ties import with_ties
from tensoradapt.scan import config_in, scan
from tensoradapt.sites import SiteMap

Models = tuple[SiteMap | None, SiteMap | None]
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

    `options` are those of `open_deltas`: `rows`, `nonfinite`, `prefix`, and `model` in the place of configs, as `scan`
    takes it. Raises FileError.
    """
    sides = (
        _named(open_checkpoint(base, base_revision), "the base"),
        _named(open_checkpoint(tuned, tuned_revision), "the tuned side"),
    )
    given = options.pop("model", None)
    known, models, note = described((base, sides[0]), (tuned, sides[1])) if given is None else _given(given)
    found = open_deltas(*with_ties(*sides, models), **options, model=known)
    return replace(found, match=replace(found.match, notes=(*found.match.notes, note))) if note else found


def _named(side: Checkpoint, role: str) -> Checkpoint:
    """A checkpoint that came without a name of its own, called by its part in the comparison."""
    return side if side.label else replace(side, name=f"{role} ({side.name.removeprefix('the ')})")


def _given(model: Any) -> tuple[SiteMap, Models, str]:
    """The model that both sides are of, as the user says."""
    known = scan(model)
    return known, (known, known), ""


def described(base: tuple[Any, Checkpoint], tuned: tuple[Any, Checkpoint]) -> tuple[SiteMap | None, Models, str]:
    """What is known of the sites, and of the model of each side: a source that is a module, or the config beside it.

    The sites are told by a module before a config, and by the tuned side's before the base's. A note where a config
    cannot be used.
    """
    modules = [isinstance(source, nn.Module) for source, _ in (base, tuned)]
    alike = not any(modules) and _config(base[1]) == _config(tuned[1])
    after = _described(*tuned)
    rows = [after if alike else _described(*base), after]
    order = sorted((1, 0), key=lambda k: not modules[k])
    known = next((rows[k][0] for k in order if rows[k][0] is not None), None)
    if any(modules) and known is not None:
        known = replace(known, name=base[1].label)
    notes = [note for _, note in rows if note and known is None]
    return known, (rows[0][0], rows[1][0]), next(iter(notes), "")


def _config(side: Checkpoint) -> bytes | None:
    path = None if side.folder is None else config_in(side.folder)
    return None if path is None else path.read_bytes()


def _described(source: Any, side: Checkpoint) -> tuple[SiteMap | None, str]:
    """The sites of a side's model: a module's own, or those that its config builds; a note where that fails."""
    if isinstance(source, nn.Module):
        return scan(source), ""
    if side.folder is None or config_in(side.folder) is None:
        return None, ""
    try:
        return scan(side.folder), ""
    except FileError as error:
        return None, f"layouts are judged by name: {next(iter(str(error).splitlines()))}"
