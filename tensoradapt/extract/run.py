"""`extract`: two checkpoints and a spec -> a fitted adapter, saved, with the error of every site.

Invariant: the errors reported are those of the factors as they are stored, measured on the deltas themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.sharing import alike, claimed_by, together
from tensoradapt.analysis.source import READING, known, open_source
from tensoradapt.errors import FileError
from tensoradapt.extract.goals import Goal
from tensoradapt.extract.holding import Fitted, holding
from tensoradapt.extract.journal import Journal, opened
from tensoradapt.extract.measure import overall, worst_of
from tensoradapt.extract.output import Output
from tensoradapt.extract.part import is_of
from tensoradapt.extract.planning import allocated, check_reach, planned
from tensoradapt.extract.result import Extraction
from tensoradapt.extract.seen import check_seen, check_targets
from tensoradapt.extract.whole import whole_change
from tensoradapt.extract.work import Done, Work
from tensoradapt.grouping import Group
from tensoradapt.io.base import WEIGHTS, fingerprint
from tensoradapt.io.saved import Saved
from tensoradapt.linalg import LARGE, SOLO, Team, each, empty
from tensoradapt.plan import START, Plan
from tensoradapt.plots.unmatched import equal
from tensoradapt.presets import SpecLike, as_spec
from tensoradapt.sites import Site

Progress = Callable[[str, int, int], None]  # a group's name, how many are done, how many there are
OPTIONS = ("seed", "overwrite", "team", "progress")
SLACK = 1e-4  # of a fitted error, for rounding


def extract(
    base: Any,
    tuned: Any,
    spec: SpecLike,
    out: str | Path,
    *,
    error: float | str | None = None,
    max_parameters: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Extraction:
    """Fit a spec's networks to tuned - base and save them as an adapter: min sum_s |D_s - scale N_s|^2.

    A rule without targets takes every weight that differs and that its format can hold. Ranks are the spec's. With
    `error` they are the smallest that leave at most that relative error in every group (0:
    all that float32 can hold); with error='noise', all that rises above the rounding noise of the stored dtypes, groups
    of nothing else left out; with `max_parameters`, the best within that many over all groups. The spec's own ranks are
    no ceiling then. `out` is a folder, or a path that ends in .safetensors. Interrupted work goes on where it stopped,
    if inputs and options are the same. Further options: `seed`, `overwrite`, `team`, `progress`, and those of reading:
    `rows`, `nonfinite`, `prefix`, `model`, `base_revision`, `tuned_revision`. Raises FileError, SiteError, SpecError,
    RankError.
    """
    known(options, (*OPTIONS, *READING))
    spec = as_spec(spec, "ta.extract(base, tuned, spec, out)")
    overwrite, progress = options.pop("overwrite", False), options.pop("progress", None)
    team: Team = options.pop("team", SOLO)
    where, there = (device, options.pop("seed", 0)), empty(device).device
    output, goal = Output.of(out), Goal(error, max_parameters)
    together(team, lambda: output.check((), overwrite=overwrite))
    with claimed_by(team, output.claim), alike(team, lambda: open_source(base, tuned, **options).on(there)) as deltas:
        files = (*deltas.base.files, *deltas.tuned.files)
        together(team, lambda: output.check(files, overwrite=overwrite))
        alike(team, lambda: check_targets(spec, deltas.match))
        whole = whole_change(deltas, team, progress)
        alike(team, lambda: check_seen(whole, deltas.match))
        work = alike(team, lambda: planned(deltas, whole, spec, goal, where, team, options))
        alike(team, lambda: check_reach(work, progress))
        with opened(output.journal, work.identity, team) as journal:
            result = _made(allocated(work, progress), journal, output, progress)
            team.wait()
            if team.rank == 0:
                journal.remove()
    return result


def _made(work: Work, journal: Journal, output: Output, progress: Progress | None) -> Extraction:
    """Fit every group, put the parts together, and write them down."""
    _fit_all(work, journal, progress)
    done = alike(work.team, lambda: [_part(work, journal, name) for name in work.groups])
    made = assembled(work, done)
    made = replace(made, plan=replace(made.plan, model=work.deltas.base.label), base=_base(work, made.plan))
    result = _result(work, made, done, output.file if made.plan.groups else None)
    leads = work.team.rank == 0 and result.path is not None
    together(work.team, lambda: output.write(made, result.to_dict()) if leads else None)
    return result


def _base(work: Work, plan: Plan) -> dict[str, Any]:
    """What is known of the base: where it is from, and a fingerprint. The sites have the tuned side's names."""
    deltas = work.deltas

    def read(site: Site) -> Tensor:
        pair = deltas.pair(work.stored(site).path)
        return deltas.base.read(pair.base_name, pair.site.index)

    of = deltas.base.origin
    named = {"name": of.name, "hub": of.hub, "revision": deltas.base.revision or of.revision} if of else {}
    return {**named, WEIGHTS: fingerprint(plan, read)}


def _fit_all(work: Work, journal: Journal, progress: Progress | None) -> None:
    """Fit what is not done yet: groups of one delta some at a time, the others one after the other.

    What is left is the first member's word, so that all of a team take part in the same groups in the same order.
    """
    left = together(work.team, lambda: [name for name in work.groups if _kept(work, journal, name) is None])[0]
    mine = [name for name in left if work.is_mine(name)]
    shared = [name for name in mine if work.shared(name)]
    small = [name for name in mine if work.like.device.type == "cpu" and _small(work.group(name))]
    count, tell = len(work.groups) - len(left), progress or (lambda *_: None)

    made: dict[str, Done] = {}
    running: list[str] = []

    def begin(name: str) -> None:
        running.append(name)
        tell(name, count, len(work.groups))

    def compute(name: str) -> None:
        made[name] = work.fit(name)

    def keep(name: str) -> None:
        """Write a group down, on the caller's thread: an interruption leaves none that writes behind it."""
        nonlocal count
        done = made.pop(name)
        if done.writes:
            journal.write(name, done.tensors, done.record)
        count += 1
        running.remove(name)
        tell(running[0] if running else name, count, len(work.groups))

    def fit(name: str) -> None:
        begin(name)
        compute(name)
        keep(name)

    def alone() -> None:
        for name in each(small, compute, begin):
            keep(name)
        for name in (n for n in mine if n not in small and n not in shared):
            fit(name)

    together(work.team, alone)
    for name in shared:
        fit(name)
    work.team.wait()


def _small(group: Group) -> bool:
    """Whether a group is one delta of which several fit into memory."""
    return len(group.placements) == 1 and group.placements[0].site.numel <= LARGE


def _part(work: Work, journal: Journal, name: str) -> Done:
    found = _kept(work, journal, name)
    if found is None:
        raise FileError(f"the part of group {name!r} is gone from {journal.folder}", hint="run the command again")
    return found


def _kept(work: Work, journal: Journal, name: str) -> Done | None:
    """A finished group, as it was written; None where there is none."""
    found = journal.read(name)
    return Done(name, *found) if found is not None and is_of(work.group(name), *found) else None


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


def _result(work: Work, made: Saved, done: list[Done], path: Path | None) -> Extraction:
    sites = {site: row for d in done for site, row in d.record["sites"].items()}
    groups = {d.name: d.row(work) for d in done}
    report = {
        "base": work.deltas.base.label or work.deltas.base.name,
        "tuned": work.deltas.tuned.label or work.deltas.tuned.name,
        "requested": {"error": work.goal.error, "max_parameters": work.goal.max_parameters},
        "num_bytes": made.plan.num_bytes,
        "worst_site": worst_of(sites),
        "groups": groups,
        "sites": sites,
        "match": work.deltas.match.to_dict(),
    }
    notes = (*work.notes, *_notes(work, groups))
    change = holding(work.deltas, work.whole, _fitted(work, done), _reasons(work, done))
    return Extraction(path, overall(sites.values())[1], made.plan.num_trainable, made.plan, report, change, notes)


def _fitted(work: Work, done: list[Done]) -> Iterator[Fitted]:
    """Every site of the plan, with what its factors leave of it."""
    for part in done:
        for placement in work.group(part.name).placements:
            row = part.record["sites"][placement.site.path]
            squares = row["norm"] ** 2, row["error"] ** 2
            yield Fitted(placement.site, work.stored(placement.site), *squares, kept=bool(part.tensors))


def _reasons(work: Work, done: list[Done]) -> dict[str, str]:
    """Why tensors that differ are not in the adapter, by their names."""
    out = [p.site for part in done if not part.tensors for p in work.group(part.name).placements]
    names = {work.deltas.pair(work.stored(site).path).tuned_name for site in out}
    paths = {pair.site.path: pair.tuned_name for pair in work.deltas.match.pairs}
    refused = {paths.get(path, paths.get(path.rpartition("[")[0], path)): why for path, why in work.reasons.items()}
    return {**work.deltas.match.refused, **refused, **dict.fromkeys(names, work.left_out)}


def _notes(work: Work, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What a user should know of the groups: an error that was not reached, or that nothing differs."""
    wanted = work.goal.error
    missed = [
        n for n, row in groups.items() if isinstance(wanted, float | int) and row["fitted_error"] > wanted + SLACK
    ]
    if missed:
        yield f"{len(missed)} groups cannot reach the error {wanted}, at their largest rank: {', '.join(missed[:5])}"
    if not any(row["norm"] for row in groups.values()):
        match = work.deltas.match
        same = equal(match.only_base, match.only_tuned)
        yield f"{'the checkpoints are equal at the targeted sites' if work.whole.names else same}: nothing to extract"
