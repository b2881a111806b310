"""Two checkpoints with what their config says: the stream of deltas that analysis and extraction read.

Invariant: a module or a config tells layouts, kinds and heads; without one, or without transformers, layouts are not
known, and every delta has the sides of its stored tensor.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from tensoradapt.errors import FileError, SpecError
from tensoradapt.host import HOST
from tensoradapt.io.checkpoint import Checkpoint, open_checkpoint
from tensoradapt.io.config import config_in
from tensoradapt.io.conversion import Conversion, conversion_of, converted
from tensoradapt.io.pairs import Deltas, open_deltas
from tensoradapt.io.ties import with_ties
from tensoradapt.plots.unmatched import unmatched
from tensoradapt.scan import described_by, scan, told_by
from tensoradapt.sites import SiteMap

ENOUGH = 0.9  # below this share of the smaller side's weights a warning says how many have a counterpart
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
        _plain(_named(open_checkpoint(base, base_revision), "the base")),
        _named(open_checkpoint(tuned, tuned_revision), "the tuned side"),
    )
    _check_merged(sides[1])
    given = options.pop("model", None)
    about = described((base, sides[0]), (tuned, sides[1])) if given is None else _given(given)
    sides = (about.renamed(sides[0], 0), about.renamed(sides[1], 1))
    found = open_deltas(*with_ties(*sides, about.models), **options, model=about.known)
    if about.note:
        found = replace(found, match=replace(found.match, notes=(*found.match.notes, about.note)))
    for line in _little(found):
        warnings.warn(line, stacklevel=3)
    return found


def _little(deltas: Deltas) -> Iterator[str]:
    """What to warn of where the sides have little in common: each has weights that the other lacks."""
    both = len({pair.tuned_name for pair in deltas.match.pairs})
    fewest = both + min(map(len, deltas.match.lone))
    if both < ENOUGH * fewest:
        line = next(unmatched(*deltas.match.lone))
        yield f"only {both:,} of {fewest:,} weights have a counterpart, and no result is of the others: {line}"


def _named(side: Checkpoint, role: str) -> Checkpoint:
    """A checkpoint that came without a name of its own, called by its part in the comparison."""
    return side if side.label else replace(side, name=f"{role} ({side.name.removeprefix('the ')})")


def _plain(side: Checkpoint) -> Checkpoint:
    """A checkpoint without the factors of adapters that are attached to its model."""
    return replace(side, entries={name: entry for name, entry in side.entries.items() if HOST not in name.split(".")})


def _check_merged(side: Checkpoint) -> None:
    """Raise FileError where the change of a side is in an adapter, and not in its weights."""
    inside = next((name for name in side.entries if HOST in name.split(".")), None)
    if inside is not None:
        raise FileError(
            f"{side.name} holds an adapter of tensoradapt that is not merged",
            got=inside,
            expected="weights with the change in them",
            hint="merge it first, adapter.merge() or adapter.merge_and_detach(); what it adds is in the adapter itself",
        )


@dataclass(frozen=True)
class About:
    """What is known of the sites, of the model of each side, and of how each side's tensors become its modules'."""

    known: SiteMap | None
    models: Models
    conversions: tuple[Conversion | None, Conversion | None]
    note: str = ""

    def renamed(self, side: Checkpoint, which: int) -> Checkpoint:
        """A side under the names of its own model's modules, or else of the other side's."""
        return converted(side, self.conversions[which] or self.conversions[1 - which])


def _given(model: Any) -> About:
    """The model that both sides are of, as the user says."""
    module, known = told_by(model)
    conversion = None if module is None else conversion_of(module)
    return About(known, (known, known), (conversion, conversion))


def described(base: tuple[Any, Checkpoint], tuned: tuple[Any, Checkpoint]) -> About:
    """What is known of two sources: by the modules that they are, or by the configs beside them.

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
    notes = [note for *_, note in rows if note and known is None]
    return About(known, (rows[0][0], rows[1][0]), (rows[0][1], rows[1][1]), next(iter(notes), ""))


def _config(side: Checkpoint) -> bytes | None:
    path = None if side.folder is None else config_in(side.folder)
    return None if path is None else path.read_bytes()


def _described(source: Any, side: Checkpoint) -> tuple[SiteMap | None, Conversion | None, str]:
    """The sites and names of a side's model, a module or what its config builds; a note where that fails."""
    if isinstance(source, nn.Module):
        return scan(source), conversion_of(source), ""
    try:
        found = by_config(side)
    except FileError as error:
        return None, None, f"layouts are not known: {_without_folder(error, side)}"
    return (None, None, "") if found is None else (found[1], conversion_of(found[0]), "")


def _without_folder(error: FileError, side: Checkpoint) -> str:
    """What a config is at fault with, for notes, which go into files: without the folder that it lies in."""
    return next(iter(str(error).splitlines())).replace(f"{side.folder}{os.sep}", "")


def as_modules(side: Checkpoint) -> tuple[Checkpoint, SiteMap | None]:
    """A checkpoint under the names of the modules that the config beside it describes, and these; a note where not."""
    try:
        found = by_config(side)
    except FileError as error:
        note = f"names are those of the files: {_without_folder(error, side)}"
        return replace(side, notes=(*side.notes, note)), None
    return (side, None) if found is None else (converted(side, conversion_of(found[0])), found[1])


def by_config(side: Checkpoint) -> tuple[nn.Module, SiteMap] | None:
    """The model that the config beside a checkpoint describes, without weights; None without one. Raises FileError."""
    config = None if side.folder is None else config_in(side.folder)
    return None if config is None else described_by(config)
