"""Ties: the names that a checkpoint's model has for one tensor, by its model, by equal memory, or by equal values.

Invariant: a name is added only where the model has it and the checkpoint has not; whatever name is read, the values are
those of the one tensor that is stored. Of tied names the model's first is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import AdapterError
from tensoradapt.io.checkpoint import Checkpoint, Entry
from tensoradapt.io.names import shift
from tensoradapt.plan import overlap
from tensoradapt.sites import Site, SiteMap

Find = Callable[..., str | None]  # from names, likeliest first, to the one that a checkpoint has


def with_ties(
    base: Checkpoint, tuned: Checkpoint, models: tuple[SiteMap | None, SiteMap | None]
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints with every name of their tied tensors; `models` are those that each is read into, or None.

    As in transformers' loader, tensors that a model ties and a checkpoint stores apart are tied where they are equal,
    and what it lacks is the one that it has. Where no model is known, what one side ties the other ties too, unless it
    stores the two apart.
    """
    sides = [_by_model(side, model) if model else side for side, model in zip((base, tuned), models, strict=True)]
    if not any(models):
        sides = [_by_value(sides[0], sides[1]), _by_value(sides[1], sides[0])]
    for k, model in enumerate(models):
        if model is None:
            other = sides[1 - k]
            sides[k] = _tied(sides[k], _classes(other.aliases), other.entries)
    return sides[0], sides[1]


def _by_model(side: Checkpoint, model: SiteMap) -> Checkpoint:
    return _tied(side, _classes(model.ties), {*model.parameters, *model.ties})


def _classes(ties: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Names of one tensor each, the first name first, of a mapping from the others to it."""
    found: dict[str, list[str]] = {}
    for name, first in ties.items():
        found.setdefault(first, [first]).append(name)
    return [tuple(names) for names in found.values()]


def _tied(side: Checkpoint, classes: Sequence[tuple[str, ...]], names: Collection[str]) -> Checkpoint:
    """The checkpoint with classes of tied names, which are among those that others call its tensors."""
    by = shift(side.entries, names)
    stored = {by(name) or name: name for name in side.entries}
    back = shift(names, side.entries)
    for members in classes:
        held = [stored[name] for name in members if name in stored]
        equal = [name for name in held if _equal(side, name, held[0])]
        absent = {name: back(name) or name for name in members if name not in stored}
        mine = [absent.get(name) or stored[name] for name in members if name in absent or stored[name] in equal]
        if held and len(mine) > 1 and not any(name in side.entries for name in absent.values()):
            side = _named(side, mine, held[0])
    return side


def _equal(side: Checkpoint, name: str, other: str) -> bool:
    """Whether two stored tensors are one, or hold the same."""
    if side.first(name) == side.first(other):
        return True
    one, two = side.entries[name], side.entries[other]
    return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(side.read(name), side.read(other))


def _named(side: Checkpoint, names: Sequence[str], holder: str) -> Checkpoint:
    """The checkpoint with names for one tensor, in the place of the earliest of them; `holder` is stored."""
    kept = side.entries[holder]
    rows = {name: side.entries.get(name) or Entry(name, kept.shape, kept.dtype, kept.file) for name in names}
    entries: dict[str, Entry] = {}
    for name, entry in side.entries.items():
        entries |= rows if name in rows else {name: entry}
    aliases = {name: first for name, first in side.aliases.items() if name not in rows}
    aliases = {name: names[0] if first in rows else first for name, first in aliases.items()}
    aliases |= dict.fromkeys(names[1:], names[0])
    further = {name: holder for name in names if name not in side.entries}
    return replace(side, entries=entries, aliases=aliases, view=side.view.also(further))


def _by_value(side: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The checkpoint with tables outside the layers that hold the same as one, unless the other side's differ."""
    tables: dict[Any, list[str]] = {}
    for name, entry in side.entries.items():
        if name not in side.aliases and len(entry.shape) == 2 and not any(p.isdecimal() for p in name.split(".")):
            tables.setdefault((entry.shape, entry.dtype), []).append(name)
    for names in tables.values():
        while len(names) > 1:
            first, *rest = names
            same = [name for name in rest if _equal(side, name, first) and not _differ(other, name, first)]
            if same and not _is_constant(side.read(first)):
                side = _named(side, [first, *same], first)
            names = [name for name in rest if name not in same]
    return side


def _differ(side: Checkpoint, name: str, other: str) -> bool:
    return name in side.entries and other in side.entries and not _equal(side, name, other)


def _is_constant(tensor: Tensor) -> bool:
    """Whether all entries are equal: such tables are fresh ones rather than tied."""
    return not tensor.numel() or bool((tensor == tensor[0, 0]).all())


def stored_names(site: Site, names: Sequence[str], find: Find) -> list[str]:
    """The names under which a checkpoint has a site's weight: several where modules that are tied are stored apart."""
    found = [find(*names), *(find(f"{twin}.weight") for twin in site.joined)]
    return list(dict.fromkeys(name for name in found if name is not None))


def check_ties(sites: Sequence[Site], name: str, find: Find, where: str, *, tied: bool) -> None:
    """Raise AdapterError where modules that share a stored tensor would not get the deltas that the adapter has.

    `tied=True` allows it where some of them have none.
    """
    for k, site in enumerate(sites):
        other = next((s for s in sites[:k] if overlap(replace(s, tensor=site.tensor), site)), None)
        if other is not None:
            raise AdapterError(
                f"{other.path} and {site.path} are one tensor of {where}, and each has a delta of its own",
                hint="untie them: load base and adapter, adapter.merge_and_detach(untie=True), and save the model",
            )
        apart = {alias for alias in site.aliases if find(f"{alias}.weight") not in (None, name)}
        others = sorted(set(site.aliases) - set(site.joined) - apart)
        if others and not tied:
            raise AdapterError(
                f"{site.path} is tied to {', '.join(others)}: merging would change both",
                hint="tied=True (--tied) does that; or untie the two in the model, merge there, and save it",
            )
