"""Which tensors of two checkpoints are sites: by what is known of the model, and else by name, shape and dtype.

Invariant: a tensor of both sides becomes a pair (or one for each of its experts), or is in `refused` with a reason, or
is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import Entry
from tensoradapt.io.names import Shift
from tensoradapt.layouts import AS_STORED, IN_OUT, READ
from tensoradapt.sites import Site, SiteMap, expert_sites

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 3  # tensors in an error
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One site in both checkpoints, and the tensors that hold it."""

    site: Site
    base_name: str
    tuned_name: str
    base_dtype: torch.dtype
    tuned_dtype: torch.dtype


class Reshaped(NamedTuple):
    """A tensor with another number of rows on the two sides, and what was done about it."""

    name: str
    base: Shape
    tuned: Shape
    done: str


@dataclass
class Judged:
    """What became of the tensors of both sides, one after the other."""

    rows: str
    known: SiteMap
    by: Shift  # from the tuned side's names to those of the known sites
    sides: tuple[str, str]  # what the base and the tuned side are called
    pairs: list[Pair] = field(default_factory=list)
    reshaped: list[Reshaped] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    mismatched: list[Reshaped] = field(default_factory=list)

    def take(self, tuned: Entry, base: Entry, twins: Sequence[str] = (), joined: Sequence[str] = ()) -> None:
        """Judge one tensor; `twins` are the base's other names of it, `joined` those that are the tuned side's too.

        Raises FileError where it is a quantised weight.
        """
        shape = self._shape(tuned, base)
        sites, reason = self._sites(tuned.name, shape)
        reason = reason or _no_number(tuned, base, self.sides)
        if reason:
            differs = f", {base.shape} in the base and {tuned.shape} in the tuned side"
            self.refused[tuned.name] = reason + (differs if base.shape != tuned.shape else "")
            return
        if base.shape != tuned.shape:
            self._reshape(tuned, base)
        tied = self._tied(twins, joined, shape)
        self.pairs += [Pair(replace(site, **tied), base.name, tuned.name, base.dtype, tuned.dtype) for site in sites]

    def _tied(self, twins: Sequence[str], joined: Sequence[str], shape: Shape) -> dict[str, Any]:
        """The modules that share a tensor of the base, and those of them that share the delta: those that are sites.

        Where the model is known a module that stands in two places is one, and its second name is no site.
        """
        sites = {name: self._sites(name, shape)[0] for name in twins}
        if self.known.sites:
            sites = {name: found for name, found in sites.items() if self._model_path(name) in self._owners}
        paths = {name: found[0].owner for name, found in sites.items() if len(found) == 1 and found[0].index is None}
        both = [name for name in joined if name in paths]
        kinds = tuple(sites[name][0].kind for name in both)
        return {
            "aliases": tuple(paths.values()),
            "joined": tuple(paths[name] for name in both),
            "joined_kinds": kinds,
            "everywhere": not self.known.sites,
        }

    def _shape(self, tuned: Entry, base: Entry) -> Shape:
        """The stored shape of the delta: that of both, or with the rows that are asked for."""
        if base.shape == tuned.shape or not tuned.shape or not base.shape:
            return tuned.shape
        return (max if self.rows == "pad" else min)(tuned.shape[0], base.shape[0]), *tuned.shape[1:]

    def _reshape(self, tuned: Entry, base: Entry) -> None:
        """Record another shape: a number of rows outside the layers, or what cannot be matched."""
        row = Reshaped(tuned.name, base.shape, tuned.shape, self.rows)
        (self.reshaped if self.rows != "error" and _more_rows(row) else self.mismatched).append(row)

    def _sites(self, name: str, shape: Shape) -> tuple[list[Site], str]:
        """The sites of a tensor, or why it has none."""
        if len(shape) < 2 or 0 in shape:
            return [], "empty" if 0 in shape else "a scalar" if not shape else "1-D: a norm, a bias or a scale"
        path = self._model_path(name)
        owner = path.rpartition(".")[0]
        if path in self._owners:
            return [_named(site, name, shape) for site in self._owners[path]], ""
        if owner in self.known.refused or path in self.known.refused:
            return [], self.known.refused.get(path) or self.known.refused[owner]
        if len(shape) != 2 and {path, self.by(name)} & self.known.parameters.keys():
            return [], f"{len(shape)}-D: no weight of a module that can be adapted"
        return _by_name(name, shape)

    @cached_property
    def _owners(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self.known.sites:
            found.setdefault(site.owner, []).append(site)
        return found

    @property
    def notes(self) -> list[str]:
        """What the config knows nothing of: an adapter of it does not attach to the model that the config describes."""
        strange = [pair.site.path for pair in self.pairs if self._model_path(pair.tuned_name) not in self._owners]
        if not self.known.sites or not strange:
            return []
        return [f"{len(strange)} sites have other names in the model that the config describes: {strange[0]}"]

    def _model_path(self, name: str) -> str:
        """What the model calls the owner of a tensor."""
        return self.by(name).removesuffix(".weight") or name.removesuffix(".weight")

    def check(self) -> None:
        """Raise FileError where shapes differ, or two tensors are one site."""
        if self.mismatched:
            raise self._differing()
        seen: dict[str, str] = {}
        for pair in self.pairs:
            if seen.setdefault(pair.site.path, pair.tuned_name) != pair.tuned_name:
                raise FileError(f"{seen[pair.site.path]} and {pair.tuned_name} are both the site {pair.site.path}")

    def _differing(self) -> FileError:
        shown = "; ".join(f"{r.name} {r.base} and {r.tuned}" for r in self.mismatched[:SHOWN])
        names = {pair.tuned_name for pair in self.pairs}
        tokens = sum(map(_more_rows, self.mismatched))
        many = 2 * (len(self.mismatched) - tokens) > len(names)
        what = "are of different models" if many else "differ in shape"
        return FileError(
            f"{' and '.join(self.sides)} {what}: {len(self.mismatched)} of {len(names)} weights have another shape",
            got=shown + (" ..." if len(self.mismatched) > SHOWN else ""),
            hint='added tokens: rows="truncate" compares the rows of both, rows="pad" all'
            if tokens and not many
            else "give the base that the tuned model was made from",
        )


def _named(site: Site, name: str, shape: Shape) -> Site:
    """A known site under a checkpoint's name, with the shape that is stored there."""
    own = name.removesuffix(".weight")
    moved = lambda alias: own.removesuffix(site.owner) + alias if own.endswith(site.owner) else alias  # noqa: E731
    here = _told(site, name, shape if site.index is None else shape[1:])
    return replace(
        here,
        path=own + site.path.removeprefix(site.owner),
        owner=own,
        tensor=name,
        aliases=tuple(map(moved, site.aliases)),
    )


def _told(site: Site, name: str, stored: Shape) -> Site:
    """The site with the shape that is stored; a 1-D convolution has a kernel of one row.

    Raises FileError where the tensor lies the other way round than the model has it.
    """
    crossed = len(stored) == 2 and stored != stored[::-1] == _sides(site, site.shape)
    if crossed:
        raise FileError(
            f"{name} is stored the other way round than the model has it",
            got=stored,
            expected=f"{stored[::-1]}: {READ[site.layout]}",
            hint="give the model=, or the config, of the class that these checkpoints were saved from",
        )
    shape = _sides(site, stored)
    return replace(site, shape=shape if len(shape) == len(site.shape) else (*shape[:2], 1, *shape[2:]))


def _sides(site: Site, shape: Shape) -> Shape:
    """A stored shape as the site has it, or the other way about."""
    return shape[::-1] if site.layout == IN_OUT else shape


def _by_name(name: str, shape: Shape) -> tuple[list[Site], str]:
    """The sites of a tensor of which only name and shape are known, or why it has none."""
    path = name.removesuffix(".weight")
    if name.endswith("bias"):
        return [], "a bias"
    if len(shape) == 3 and "expert" in name:
        return expert_sites(name, shape), ""
    if len(shape) == 3 and "conv" in path:  # a kernel of one row, as a live Conv1d has it
        shape = (*shape[:2], 1, shape[2])
    if len(shape) not in (2, 4):
        return [], f"{len(shape)}-D: no matrix, convolution or stack of experts"
    if len(shape) == 4:
        return [Site(path, shape, owner=path, tensor=name, kind="conv")], ""
    kind = "embedding" if is_embedding(path) else "linear"  # what to call it: the layout is not told by a name
    return [Site(path, shape, layout=AS_STORED, owner=path, tensor=name, kind=kind)], ""


def is_embedding(path: str) -> bool:
    """Whether a module has a name as tables of rows have it: `embed_tokens`, `wte`. It may be a Linear."""
    name = path.rpartition(".")[2]
    return name in ("wte", "wpe") or ("embed" in name and "unembed" not in name and not name.endswith("_out"))


def _more_rows(row: Reshaped) -> bool:
    """Whether a matrix outside the layers differs in its number of rows alone, as added tokens have it."""
    outside = not any(part.isdecimal() for part in row.name.split("."))
    return outside and len(row.tuned) == 2 and row.base[1:] == row.tuned[1:]


def is_packed(entry: Entry) -> bool:
    """Whether a tensor is a weight in fewer bits than a number of its own: packed integers, float8."""
    weight = entry.name.endswith("weight") and len(entry.shape) > 1 and not entry.dtype.is_complex
    return entry.dtype not in FLOATS and (weight or entry.dtype.is_floating_point)


def _no_number(tuned: Entry, base: Entry, sides: tuple[str, str]) -> str:
    """Why a tensor's entries are no numbers of a weight; empty where they are. Raises FileError on packed ones."""
    for entry, side in zip((base, tuned), sides, strict=True):
        if is_packed(entry):
            raise quantised(entry, side)
    other = next((e.dtype for e in (base, tuned) if e.dtype not in FLOATS), None)
    return f"holds {str(other)[6:]}" if other else ""


def quantised(entry: Entry, side: str) -> FileError:
    """The error on a weight that is packed."""
    return FileError(
        f"{entry.name} of {side} is quantised; give the dequantised base",
        got=str(entry.dtype)[6:],
        expected="float64, float32, float16 or bfloat16",
    )
