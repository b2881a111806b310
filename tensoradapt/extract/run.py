"""`extract`: two checkpoints and a spec -> a fitted adapter, saved, with the error of every site.

Invariant: the errors reported are those of the factors as they are stored, measured on the deltas themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.extract.goals import Goal
from tensoradapt.extract.journal import Journal, opened
from tensoradapt.extract.pool import each
from tensoradapt.extract.work import Done, Work, allocated, prepared
from tensoradapt.io.native import file_of, write
from tensoradapt.io.saved import Saved
from tensoradapt.linalg import SOLO, Team
from tensoradapt.plan import START, Plan
from tensoradapt.spec import Spec

Progress = Callable[[str, int, int], None]  # a group's name, how many are done, how many there are


@dataclass(frozen=True)
class Extraction:
    """What was extracted: the adapter's file (None where there was nothing), its plan, and the errors.

    `relative_error` = sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2) over all targeted sites, after rounding to the stored
    dtype; `report` has the same by site and by group.
    """

    path: Path | None
    relative_error: float
    num_parameters: int
    plan: Plan
    report: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "path": None if self.path is None else str(self.path),
            "relative_error": self.relative_error,
            "num_parameters": self.num_parameters,
            **self.report,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("group", "sites", "ranks", "parameters", "relative error")]
        for name, row in self.report["groups"].items():
            ranks = " ".join(f"{bond}={size}" for bond, size in row["rank"].items()) or "left out"
            rows.append((name, str(row["sites"]), ranks, f"{row['num_parameters']:,}", f"{row['relative_error']:.4g}"))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = [
            "  ".join(c.ljust(w) if k in (0, 2) else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        worst = self.report["worst_site"]
        total = f"{self.num_parameters:,} parameters, relative error {self.relative_error:.4g}"
        lines.append(f"{total}; worst site {worst['path']} at {worst['relative_error']:.4g}" if worst else total)
        lines.append("nothing to extract" if self.path is None else f"written to {self.path}")
        return "\n".join([line.rstrip() for line in lines] + [f"note: {note}" for note in self.notes])


def extract(
    base: Any,
    tuned: Any,
    spec: Spec,
    out: str | Path,
    *,
    error: float | str | None = None,
    max_parameters: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Extraction:
    """Fit a spec's networks to tuned - base and save them as an adapter: min sum_s |D_s - scale N_s|^2.

    Ranks are the spec's; or the smallest with a relative `error` of at most so much in every group; or, with
    error='noise', all that rises above the rounding noise of the stored dtypes; or the best within `max_parameters`
    over all groups. `out` is a folder. Interrupted work goes on where it stopped. Further options: `seed`, `overwrite`,
    `team`, `progress`, and those of reading: `rows`, `nonfinite`, `base_revision`, `tuned_revision`. Raises FileError,
    SiteError, SpecError, RankError.
    """
    file = file_of(out)
    overwrite, progress = options.pop("overwrite", False), options.pop("progress", None)
    team: Team = options.pop("team", SOLO)
    where = (device, options.pop("seed", 0))
    work = prepared(base, tuned, spec, Goal(error, max_parameters), where, team, options)
    with work.deltas:
        _check_output(file, work, overwrite)
        with opened(_folder(out), work.identity, leader=team.rank == 0) as journal:
            work = allocated(work)
            _fit_all(work, journal, progress)
            team.wait()
            done = [_part(work, journal, name) for name in work.groups]
            made = assembled(work, done)
            result = _finished(work, made, done, file)
            team.wait()
            if team.rank == 0:
                journal.remove()
    return result


def _folder(out: str | Path) -> Path:
    path = Path(out)
    return path.with_suffix("") if path.suffix == ".safetensors" else path


def _check_output(file: Path, work: Work, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise FileError(f"{file} exists", hint="choose another output, or overwrite=True (--overwrite)")
    inputs = {f.resolve() for side in (work.deltas.base, work.deltas.tuned) for f in side.files}
    if file.resolve() in inputs or any(file.parent.resolve() == f.parent for f in inputs):
        raise FileError(f"{file.parent} holds a checkpoint that is read", hint="choose another output folder")
    if file.parent.exists() and not file.parent.is_dir():
        raise FileError(f"{file.parent} is a file, not a folder", hint="choose another output")


def _fit_all(work: Work, journal: Journal, progress: Progress | None) -> None:
    """Fit what is not done yet: groups of one delta some at a time, the others one after the other."""
    left = [name for name in work.groups if work.is_mine(name) and journal.read(name) is None]
    alone = [name for name in left if work.like.device.type == "cpu" and len(work.group(name).placements) == 1]
    count, tell = len(work.groups) - len(left), progress or (lambda *_: None)

    def fit(name: str) -> None:
        done = work.fit(name)
        if done.writes:
            journal.write(name, done.tensors, done.record)

    for name in each(alone, fit):
        count += 1
        tell(name, count, len(work.groups))
    for name in (name for name in left if name not in alone):
        fit(name)
        count += 1
        tell(name, count, len(work.groups))


def _part(work: Work, journal: Journal, name: str) -> Done:
    found = journal.read(name)
    if found is None:
        raise FileError(f"the part of group {name!r} is gone from {journal.folder}", hint="run the command again")
    return Done(name, *found)


def assembled(work: Work, done: list[Done]) -> Saved:
    """The adapter of all parts: groups with their final diagrams, those without a rank left out."""
    kept = {d.name: d for d in done if d.tensors}
    groups = tuple(replace(group, diagram=kept[group.name].diagram) for group in work.plan.groups if group.name in kept)
    plan = replace(work.plan, groups=groups, extras={}, notes=work.plan.notes)
    return Saved(plan, dict(_tensors(plan, kept)))


def _tensors(plan: Plan, kept: Mapping[str, Done]) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor by its key; the largest user's of a bank; the zero start of a difference."""
    found: dict[str, Tensor] = {}
    for group in plan.groups:
        for node, key in group.store.items():
            tensor = kept[group.name].tensors[node]
            if key not in found or tensor.numel() > found[key].numel():
                found[key] = tensor
    for key, factor in plan.factors.items():
        yield key, found[key]
        if factor.copied:
            yield f"{key}{START}", torch.zeros_like(found[key])


def _finished(work: Work, made: Saved, done: list[Done], file: Path) -> Extraction:
    sites = {path: row for d in done for path, row in d.record["sites"].items()}
    total = math.fsum(row["norm"] ** 2 for row in sites.values())
    lost = math.fsum((row["relative_error"] * row["norm"]) ** 2 for row in sites.values())
    error = math.sqrt(lost / total) if total else 0.0
    path = file if made.plan.groups else None
    worst = max(sites, key=lambda p: sites[p]["relative_error"], default=None)
    report = {
        "base": work.deltas.base.name,
        "tuned": work.deltas.tuned.name,
        "requested": {"error": work.goal.error, "max_parameters": work.goal.max_parameters},
        "num_bytes": made.plan.num_bytes,
        "worst_site": {"path": worst, "relative_error": sites[worst]["relative_error"]} if worst else None,
        "groups": {d.name: d.row(work) for d in done},
        "sites": sites,
        "match": work.deltas.match.to_dict(),
    }
    notes = (*work.notes, *(() if path else ("the checkpoints are equal at the targeted sites: nothing to extract",)))
    result = Extraction(path, error, made.plan.num_trainable, made.plan, report, notes)
    if path is not None and work.team.rank == 0:
        write(file, made.plan, made.tensors)
        (file.parent / "extraction.json").write_text(json.dumps(result.to_dict(), indent=1), "utf-8")
    return result
