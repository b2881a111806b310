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
from tensoradapt.extract.holding import gaps
from tensoradapt.extract.whole import change_of
from tensoradapt.extract.words import apart, counted, little, percent, wrapped
from tensoradapt.fit.policy import squares
from tensoradapt.folders import delta_rows
from tensoradapt.io.base import check_base
from tensoradapt.io.conversion import named_as
from tensoradapt.io.finding import finder
from tensoradapt.io.pairs import Deltas
from tensoradapt.io.renamed import plainly
from tensoradapt.io.saved import Savable, Saved, as_saved, filled
from tensoradapt.layouts import turns
from tensoradapt.merging import add_rows
from tensoradapt.plots.unmatched import equal
from tensoradapt.sites import Site

WRONG = "look whether it is of this base and this tuned model, in this order; tensoradapt info shows its base"
SHOWN = 5  # rows of each list in the text
Progress = Callable[[str, int, int], None]  # a site's path, how many are done, how many there are


@dataclass(frozen=True)
class Verification:
    """How far an adapter is from tuned - base.

    `whole_error` = sqrt(sum_t |D_t - D^_t|^2 / sum_t |D_t|^2) over every tensor that differs, and `relative_error` the
    same over the adapter's sites and trained modules alone, `sites` for each of these; `changed` has the norm of every
    change that the adapter does not hold, `held_share` the share of the squared change that lies in what it does hold.
    The `tolerance` is for the first, or for the second where only what lies `within_targets` is judged. `unmeasured`
    are tensors whose change is no number, with the reason, `only_base` and `only_tuned` those that one side lacks:
    these are in no error.
    """

    relative_error: float
    whole_error: float
    sites: Mapping[str, float]
    changed: Mapping[str, float] = field(default_factory=dict)
    held_share: float | None = None
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    only_base: tuple[str, ...] = ()
    only_tuned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tolerance: float | None = None
    within_targets: bool = False

    @property
    def judged_error(self) -> float:
        """The error that the tolerance is for."""
        return self.relative_error if self.within_targets else self.whole_error

    @property
    def passed(self) -> bool:
        """Whether the judged error is within the tolerance; without one, always."""
        return self.tolerance is None or self.judged_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; an error relative to no change at all is null."""
        return {
            **{key: _plain(getattr(self, key)) for key in ("relative_error", "whole_error", "judged_error")},
            **{key: getattr(self, key) for key in ("held_share", "tolerance", "within_targets", "passed")},
            "sites": {path: _plain(error) for path, error in self.sites.items()},
            "changed": dict(self.changed),
            "unmeasured": dict(self.unmeasured),
            "only_base": list(self.only_base),
            "only_tuned": list(self.only_tuned),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        tables = [*_table("worst weights", "relative error", self.sites)]
        tables += _table("changed, and not in the adapter", "norm of the change", self.changed)
        beside = apart(self.only_base, self.only_tuned, self.unmeasured)
        return "\n".join([*self._errors(), *tables, *wrapped([*beside, *(f"note: {note}" for note in self.notes)])])

    def _errors(self) -> Iterator[str]:
        """Both errors, the judged one first, with the verdict behind it."""
        over = "its own weights" if self.within_targets else "the whole change"
        verdict = "passed" if self.passed else "missed"
        limit = "" if self.tolerance is None else f", tolerance {self.tolerance:.4g}: {verdict}"
        yield f"relative error {self.judged_error:.4g} over {over}{limit}"
        if self.held_share is None:
            yield from wrapped([f"{self._equal}: there is no change to hold"])
            return
        other = (
            (self.whole_error, "the whole change") if self.within_targets else (self.relative_error, "its own weights")
        )
        yield f"relative error {other[0]:.4g} over {other[1]}"
        yield f"its {counted(len(self.sites), 'weight')} have {percent(self.held_share)} of the squared change"
        if 1 <= self.relative_error < math.inf:
            yield from wrapped([f"worse than no adapter, whose error is 1: {WRONG}"])
        else:
            yield from wrapped(little(self.relative_error, chosen=False))

    @property
    def _equal(self) -> str:
        """What is equal where there is no change."""
        if self.unmeasured:
            return "what has a number is equal"
        return equal(self.only_base, self.only_tuned)


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
    within_targets: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Verification:
    """Compare the deltas of an adapter with tuned - base, streamed: one weight at a time.

    The tolerance is for the error over the whole change, what the adapter leaves out included; with `within_targets`
    for the error over the adapter's own weights. Further options are those of reading: `rows`, `nonfinite`, `prefix`,
    `model`, `base_revision`, `tuned_revision`. Raises FileError where the checkpoints cannot be read, lack what the
    adapter changes or leave open which side of it is `out`, SpecError on a tolerance that is none.
    """
    if tolerance is not None and not (type(tolerance) in (int, float) and 0 <= tolerance < math.inf):
        raise SpecError("a tolerance is a number of at least 0", got=tolerance, hint="write 0.1 for 10 %")
    saved = plainly(filled(as_saved(adapter), "verify"))
    with open_source(base, tuned, **options) as deltas:
        saved = named_as(saved, deltas.tuned.conversion)
        run = _Run(saved, deltas, _places(saved, deltas))
        check_base(saved.base, saved.plan, run.base_weight, saved.where, stacklevel=4)
        total, tell = len(run.deltas) + len(saved.plan.extras), progress or (lambda *_: None)
        name = ""
        for done, name in enumerate(run.steps()):
            tell(name, done, total)
        tell(name, total, total)
        return run.result(tolerance, within_targets=within_targets)


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else (math.inf if lost else 0.0)


def _places(saved: Saved, deltas: Deltas) -> dict[str, list[Site]]:
    """The adapter's sites by the path of the delta that they are part of. Raises FileError where there is none."""
    owners = {site.owner: site.owner for site in deltas.sites}
    for names in ("joined", "aliases"):  # surest first: where a tie was parted, several sites have an alias
        for site in deltas.sites:
            owners |= {name: site.owner for name in getattr(site, names) if name not in owners}
    sites = [placement.site for _, placement in saved.sites.values()]
    find = finder([site.owner for site in sites], owners)
    found: dict[str, list[Site]] = {}
    missing = []
    paths = {site.path for site in deltas.sites}
    for site in sites:
        mine = [find(site.owner, *site.aliases), *map(find, site.joined)]  # tied ones may be apart in the checkpoints
        here = dict.fromkeys(owners[name] for name in mine if name is not None)
        places = [path for o in here if (path := o if site.index is None else f"{o}[{site.index}]") in paths]
        missing += [] if places else [site.path]
        for path in places:
            found.setdefault(path, []).append(site)
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
    unmeasured: dict[str, str] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)

    def result(self, tolerance: float | None, *, within_targets: bool) -> Verification:
        """The errors that the sums make."""
        lost, own = math.fsum(self.lost.values()), math.fsum(self.whole.values())
        beside = math.fsum(norm**2 for norm in self.changed.values())
        match = self.deltas.match
        return Verification(
            _ratio(lost, own),
            _ratio(lost + beside, own + beside),
            {path: _ratio(self.lost[path], self.whole[path]) for path in self.lost},
            self.changed,
            own / (own + beside) if own + beside else None,
            self.unmeasured,
            match.only_base,
            tuple(name for name in match.only_tuned if name not in self.trained),
            match.notes,
            tolerance,
            within_targets,
        )

    def steps(self) -> Iterator[str]:
        """Give the name of one tensor after the other, and take it in."""
        for path in self.saved.plan.extras:
            yield path
            self._extra(path, self.saved.tensors[f"extra.{path}"])
        for pair in self.deltas.match.pairs:
            path = pair.site.path
            yield path
            if path in self.places:
                self._sites(pair.site, self.places[path])
            elif pair.tuned_name not in self.trained:
                self._note(path, squares(self.deltas.delta(path)))
        for name, reason in self.deltas.match.refused.items():
            if name not in self.trained:
                self._beside(name, reason)

    def _beside(self, name: str, refused: str) -> None:
        """A tensor that is no site: its change, or why there is no such number."""
        if name not in self.deltas.tuned.entries:  # a site that was left out while reading
            self.unmeasured[name] = refused
            return
        change, reason = change_of(self.deltas, name) or (0.0, "")
        if reason:
            self.unmeasured[name] = reason
        else:
            self._note(name, change)

    def _note(self, name: str, change: float) -> None:
        if change:
            self.changed[name] = math.sqrt(change)

    def _sites(self, stored: Site, sites: list[Site]) -> None:
        """Subtract what the adapter adds to one delta, in place; rows that it does not reach are a change beside it."""
        delta = whole = self.deltas.delta(stored.path)
        reached = []
        for site in sites:
            whole = delta.mT if turns(site, stored, self.saved.where) else delta
            begin, end = site.rows or (0, len(whole))
            part = whole[begin:end]
            name = stored.path if site.path in self.whole else site.path  # of a tied site in several places
            self.whole[name] = squares(part)
            add_rows(part, delta_rows(self.saved, site.path, -1.0), site.path)
            self.lost[name] = squares(part)
            reached.append((begin, end))
        self._note(f"{stored.path} (other rows)", sum(squares(whole[a:b]) for a, b in gaps(reached, len(whole))))

    def _extra(self, path: str, tensor: Tensor) -> None:
        """Compare a module that was trained whole with the tuned one; a base without it counts as zero."""
        name = self._find(path)
        if name is None or self.deltas.tuned.entries[name].shape != tuple(tensor.shape):
            raise FileError(f"{path}, which was trained whole, is not in {self.deltas.tuned.name} in this shape")
        self.trained.add(name)
        tuned, base = self.deltas.tuned.read(name).double(), self._base(name)
        start = base.double() if base is not None and base.shape == tuned.shape else torch.zeros_like(tuned)
        self.whole[path], self.lost[path] = squares(tuned - start), squares(tuned - tensor)

    def base_weight(self, site: Site) -> Tensor:
        """The base's tensor of one of the adapter's sites, or the one expert of it, as it is stored."""
        pair = self.deltas.pair(next(path for path, sites in self.places.items() if site in sites))
        return self.deltas.base.read(pair.base_name, pair.site.index)

    @cached_property
    def _find(self) -> Callable[..., str | None]:
        tensors = [placement.site.tensor for _, placement in self.saved.sites.values()]
        return finder(tensors, self.deltas.tuned.entries)

    def _base(self, name: str) -> Tensor | None:
        """The base's tensor of a name of the tuned side."""
        names = self.deltas.match.names
        return self.deltas.base.read(names[name]) if name in names else None
