"""Verification: an adapter against the two checkpoints that it stands for.

Invariant: every tensor that differs between the checkpoints is compared with the adapter, or listed as changed beside
it, or named in a note. One delta is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.source import open_source
from tensoradapt.errors import FileError, SpecError
from tensoradapt.folders import delta_rows, finder
from tensoradapt.io.pairs import Deltas
from tensoradapt.io.saved import Savable, Saved, as_saved
from tensoradapt.merging import add_rows
from tensoradapt.sites import Site

SHOWN = 10  # rows of each list in the text
Progress = Callable[[str, int, int], None]  # a site's path, how many are done, how many there are


@dataclass(frozen=True)
class Verification:
    """How far an adapter is from tuned - base.

    `relative_error` = sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2) over the adapter's sites and trained modules; `sites`
    has the same for each of them; `changed` has the norm of every change that the adapter does not hold; `only_tuned`
    are tensors that the base lacks and the adapter does not hold either.
    """

    relative_error: float
    sites: Mapping[str, float]
    changed: Mapping[str, float] = field(default_factory=dict)
    only_tuned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; without one, always."""
        return self.tolerance is None or self.relative_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; an error relative to no change at all is null."""
        return {
            "relative_error": _plain(self.relative_error),
            "tolerance": self.tolerance,
            "passed": self.passed,
            "sites": {path: _plain(error) for path, error in self.sites.items()},
            "changed": {name: _plain(norm) for name, norm in self.changed.items()},
            "only_tuned": list(self.only_tuned),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        limit = "" if self.tolerance is None else f", tolerance {self.tolerance:.4g}: "
        verdict = limit and limit + ("passed" if self.passed else "missed")
        lines = [f"relative error {self.relative_error:.4g} over {len(self.sites)} weights{verdict}"]
        lines += _table("worst weights", "relative error", self.sites)
        lines += _table("changed, and not in the adapter", "norm of the change", self.changed)
        lines += [f"only in the tuned side: {name}" for name in self.only_tuned]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _table(title: str, what: str, numbers: Mapping[str, float]) -> list[str]:
    """The largest numbers with their names."""
    rows = sorted(numbers, key=lambda name: -numbers[name])[:SHOWN]
    more = [f"  and {len(numbers) - SHOWN} more"] if len(numbers) > SHOWN else []
    return [f"{title} ({what}):"] * bool(rows) + [f"  {numbers[name]:<10.4g} {name}" for name in rows] + more


@torch.no_grad()
def verify(
    adapter: Savable | str | Path,
    base: Any,
    tuned: Any,
    *,
    tolerance: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Verification:
    """Compare the deltas of an adapter with tuned - base, streamed: one weight at a time.

    Further options are those of reading: `rows`, `nonfinite`, `prefix`, `base_revision`, `tuned_revision`. Raises
    FileError where the checkpoints cannot be read or lack what the adapter changes, SpecError on a tolerance that is
    none.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise SpecError("a tolerance is a number of at least 0", got=tolerance, hint="write 0.1 for 10 %")
    saved = as_saved(adapter)
    with open_source(base, tuned, **options) as deltas:
        run = _Run(saved, deltas, _places(saved, deltas))
        total = len(run.deltas) + len(saved.plan.extras)
        for done, name in enumerate(run.steps(), start=1):
            if progress is not None:
                progress(name, done, total)
        return Verification(
            _ratio(sum(run.lost.values()), sum(run.whole.values())),
            {path: _ratio(run.lost[path], run.whole[path]) for path in run.lost},
            run.changed,
            tuple(name for name in deltas.match.only_tuned if name not in run.trained),
            deltas.match.notes,
            tolerance,
        )


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else (math.inf if lost else 0.0)


def _places(saved: Saved, deltas: Deltas) -> dict[str, list[Site]]:
    """The adapter's sites by the path of the delta that they are part of. Raises FileError where there is none."""
    owners: dict[str, str] = {}
    for site in deltas.sites:
        for owner in (site.owner, *site.aliases):
            owners.setdefault(owner, site.owner)
    sites = [placement.site for _, placement in saved.sites.values()]
    find = finder([site.owner for site in sites], owners)
    found: dict[str, list[Site]] = {}
    missing = []
    paths = {site.path for site in deltas.sites}
    for site in sites:
        owner = owners.get(find(site.owner, *site.aliases) or "", "")
        path = owner if site.index is None else f"{owner}[{site.index}]"
        if path in paths:
            found.setdefault(path, []).append(site)
        else:
            missing.append(site.path)
    if missing:
        raise FileError(
            f"{len(missing)} of the {len(sites)} sites of {saved.where} are not in both checkpoints",
            got=", ".join(missing[:5]),
            expected=", ".join(list(paths)[:5]),
            hint="give the base and the tuned model that the adapter is of",
        )
    return found


@dataclass
class _Run:
    """The sums of squares, as the deltas go by: what the adapter should hold, and what it leaves."""

    saved: Saved
    deltas: Deltas
    places: Mapping[str, list[Site]]
    lost: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)

    def steps(self) -> Iterator[str]:
        """Take in one tensor after the other, and give its name."""
        for path in self.saved.plan.extras:
            self._extra(path, self.saved.tensors[f"extra.{path}"])
            yield path
        for pair in self.deltas.match.pairs:
            path = pair.site.path
            if path in self.places:
                self._sites(pair.site, self.places[path])
            elif pair.tuned_name not in self.trained:
                self._note(path, squares(self.deltas.delta(path)))
            yield path
        for name in self.deltas.match.refused:
            if name in self.deltas.tuned.entries and name not in self.trained:
                self._note(name, self._difference(name))

    def _note(self, name: str, change: float) -> None:
        if change:
            self.changed[name] = math.sqrt(change)

    def _sites(self, stored: Site, sites: list[Site]) -> None:
        """Subtract what the adapter adds to one delta, in place; rows that it does not reach are a change beside it."""
        delta = self.deltas.delta(stored.path)
        whole = delta if sites[0].layout == stored.layout else delta.mT
        reached = []
        for site in sites:
            begin, end = site.rows or (0, len(whole))
            part = whole[begin:end]
            if part.shape != site.shape:
                raise FileError(
                    f"{site.path} has another shape in the checkpoints", got=tuple(part.shape), expected=site.shape
                )
            self.whole[site.path] = squares(part)
            add_rows(part, delta_rows(self.saved, site.path, -1.0), site.path)
            self.lost[site.path] = squares(part)
            reached.append((begin, end))
        self._note(f"{stored.path} (other rows)", sum(squares(whole[a:b]) for a, b in _gaps(reached, len(whole))))

    def _extra(self, path: str, tensor: Tensor) -> None:
        """Compare a module that was trained whole with the tuned one; a base without it counts as zero."""
        name = self._find(path)
        if name is None or self.deltas.tuned.entries[name].shape != tuple(tensor.shape):
            raise FileError(f"{path}, which was trained whole, is not in {self.deltas.tuned.name} in this shape")
        self.trained.add(name)
        tuned, base = self.deltas.tuned.read(name).double(), self._base(name)
        start = base.double() if base is not None and base.shape == tuned.shape else torch.zeros_like(tuned)
        self.whole[path], self.lost[path] = squares(tuned - start), squares(tuned - tensor)

    @cached_property
    def _find(self) -> Callable[..., str | None]:
        tensors = [placement.site.tensor for _, placement in self.saved.sites.values()]
        return finder(tensors, self.deltas.tuned.entries)

    def _base(self, name: str) -> Tensor | None:
        """The base's tensor of a name of the tuned side."""
        names = self.deltas.match.names
        return self.deltas.base.read(names[name]) if name in names else None

    def _difference(self, name: str) -> float:
        """The squared change of a tensor that is no site; entries that are equal are none, whatever they are."""
        tuned, base = self.deltas.tuned.read(name), self._base(name)
        if base is None or base.shape != tuned.shape:
            return math.inf
        differs = base != tuned
        return squares((tuned[differs].to(torch.complex128) - base[differs].to(torch.complex128)).abs())


def squares(tensor: Tensor) -> float:
    """The sum of the squares, in float64 over the rows."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[None]
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _gaps(ranges: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What ranges that do not overlap leave of all rows."""
    last = 0
    for begin, end in sorted(ranges):
        if begin > last:
            yield last, begin
        last = max(last, end)
    if last < size:
        yield last, size
