"""Planning: what an extraction or a conversion is to make, and how a budget is shared out.

Invariant: everything that can be refused is refused here, before the first fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensoradapt.analysis.sharing import together
from tensoradapt.errors import RankError, SpecError
from tensoradapt.extract.allocate import allocate
from tensoradapt.extract.goals import Goal, climb_of, grown
from tensoradapt.extract.targets import taken
from tensoradapt.extract.whole import Tell, Whole
from tensoradapt.extract.work import Work
from tensoradapt.fit.curves import Point
from tensoradapt.grouping import Group
from tensoradapt.io.pairs import Deltas
from tensoradapt.linalg import Team, empty
from tensoradapt.plan import Plan, make_plan
from tensoradapt.rows import rank_notes, size_notes
from tensoradapt.sites import SiteMap
from tensoradapt.spec import Spec

HOURS = 2e12  # multiplications of the first fits of all groups that are not worth their time
OTHERS = "give rank=, a larger error, or a preset whose ranks the change itself shows: lora, lotr"


def planned(
    deltas: Deltas,
    whole: Whole,
    spec: Spec,
    goal: Goal,
    where: tuple[str | None, int],
    team: Team,
    reading: Mapping[str, Any],
) -> Work:
    """The work of an extraction from two checkpoints. Raises what is wrong with them, the spec or the goal."""
    like = empty(where[0])
    differing = [pair.site.path for pair in deltas.match.pairs if pair.tuned_name in whole.names]
    plan, reasons = plan_of(spec, deltas.match.sites, differing, goal)
    extras = ("modules named in `train` are not extracted: they are no deltas",) if plan.extras else ()
    notes = (*deltas.match.notes, *plan.notes, *extras)
    return Work(deltas, plan, goal, like, where[1], team, notes=notes, reading=reading, whole=whole, reasons=reasons)


def plan_of(spec: Spec, model: SiteMap, paths: Collection[str], goal: Goal) -> tuple[Plan, dict[str, str]]:
    """The plan of a spec on deltas, rules without targets for those of the paths; why some of them are in none.

    Raises SpecError on groups that no factors can be fitted to, RankError on a budget that is too small for any.
    """
    spec, reasons = taken(spec, model, paths)
    plan = make_plan(spec, model) if spec.rules else Plan(spec, (), model.name)
    if goal.chooses:  # the spec's own ranks are of no account then, capped or not
        own = {*rank_notes(plan.groups), *size_notes(plan.groups, plan.num_trainable)}
        plan = replace(plan, notes=tuple(note for note in plan.notes if note not in own))
    for group in plan.groups:
        _check(group)
    if goal.max_parameters is not None:
        _check_budget(plan.groups, goal.max_parameters)
    return plan, reasons


def _check(group: Group) -> None:
    """Refuse what no factors can be fitted to."""
    banked = [node for node, key in group.store.items() if key != f"{group.name}.{node}"]
    if set(banked) - set(group.rule.frozen):
        what = f"group {group.name!r} shares trained factors with groups of other shapes"
        raise SpecError(what, got=banked, hint="extract with shapes: separate")
    if group.scale == 0.0 or not group.trainable:
        what = f"group {group.name!r} adds nothing" if group.trainable else f"all of group {group.name!r} is frozen"
        raise SpecError(what, got=f"scale {group.scale}" if group.trainable else list(group.rule.frozen))


def _check_budget(groups: Sequence[Group], budget: int) -> None:
    """Refuse a budget that is below the least number of parameters. Raises RankError, with that number."""
    least = {group.name: sum(grown(group, 1).numel(node) for node in group.trainable) for group in groups}
    name = min(least, key=lambda n: least[n], default="")
    if name and least[name] > budget:
        raise RankError(
            "the budget is below the smallest adapter",
            got=budget,
            expected=f"at least {least[name]:,} parameters, which is rank 1 of group {name}",
            hint=f"max_parameters={sum(least.values())} is rank 1 of all {len(least)} groups",
        )


def check_reach(work: Work, tell: Tell | None = None) -> None:
    """Refuse an error that no rank of a group can be within, or that only fits of hours could show. Raises RankError.

    Of trees nothing is refused: their spectra show the ranks.
    """
    error = work.goal.error
    if not isinstance(error, float | int):
        return
    effort = 0.0
    for number, name in enumerate(work.groups):
        if tell is not None:
            tell(f"spectra of {name}", number, len(work.groups))
        climb = climb_of(work.group(name), work.stream(work.slices(name)), float(error))
        if climb is not None and climb.error > error:
            raise RankError(
                f"no rank brings group {name!r} within the error {error}",
                got=f"at least {climb.error:.2g} is left",
                hint=OTHERS,
            )
        effort += climb.effort if climb is not None else 0.0
        if effort > HOURS:
            assert climb is not None
            raise RankError(
                f"no spectrum shows the ranks of this network for the error {error}, and to try them would take hours",
                got=f"group {name!r} needs rank {climb.rank} at least",
                hint=OTHERS,
            )


def allocated(work: Work, tell: Tell | None = None) -> Work:
    """The same with the ranks of every group chosen, where one budget is to be shared out."""
    budget = work.goal.max_parameters
    if budget is None or not work.groups:
        return work
    mine = [name for name in work.groups if work.is_mine(name)]

    def curve(name: str) -> tuple[list[Point], float]:
        if tell is not None:
            tell(f"spectra of {name}", mine.index(name), len(mine))
        return work.curve(name)

    shared = [(name, curve(name)) for name in mine if work.shared(name)]  # in step with the others
    parts = together(work.team, lambda: {name: curve(name) for name in mine if not work.shared(name)})
    found = {**dict(shared), **{name: row for part in parts for name, row in part.items()}}
    curves, totals = ({name: found[name][k] for name in work.groups} for k in (0, 1))
    return replace(work, chosen=allocate(curves, totals, budget))  # type: ignore[arg-type]
