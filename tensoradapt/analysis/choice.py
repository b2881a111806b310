"""The choice among candidates: which of them to take, by a rule that is said, and formats beside each other.

Invariant: the others are compared with LoRA at the rank that the change has; the choice is as close with the fewest
parameters, and is not praised for what it does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensoradapt.analysis.answer import Answer, Needed, answered
from tensoradapt.analysis.candidates import FAMILIES, Candidate, Tried, candidates_of
from tensoradapt.analysis.spectra import SiteReport
from tensoradapt.plots.answer import RULE_WORDS, dense_words, rank_words
from tensoradapt.plots.words import percent
from tensoradapt.spec import Rule, Spec

RESOLVED = 1e-3  # relative errors below this are differences of sums of float32 squares: all the same
EXACT = 0.01  # the relative error from which on a lower rank than the median one will do
CLOSE = 0.1  # the relative error from which on a candidate is said not to hold the change
NOISY = 1.1  # what is left may be this many times the rounding noise and still be no more than it
NEAR = 1e-6
LOW = 0.5  # the part of the dense change up to which an adapter that is close is one of low rank


@dataclass(frozen=True)
class Choice:
    """The answer, the candidates, which of them to take and why, and formats beside each other."""

    answer: Answer | None
    candidates: tuple[Candidate, ...] = ()
    choice: Mapping[str, Any] | None = None
    comparisons: Mapping[str, Any] = field(default_factory=dict)


def chosen(sites: Mapping[str, SiteReport], stacks: Sequence[Tried]) -> Choice:
    """Every format at every rank over all stacks, the front of error against parameters, the answer, and the choice."""
    found = candidates_of(stacks) if stacks else []
    marked = tuple(replace(c, front=not any(_better(other, c) for other in found)) for c in found)
    answer = answered(sites, marked)
    loras = [c for c in marked if c.preset == "lora"]
    if answer is None or not loras:
        return Choice(answer, marked)
    reference, why = _reference(loras, answer)
    choice = _choice(marked, reference, why, answer)
    spec = Spec(rules=tuple(_rule(choice["label"], marked, stack) for stack in stacks)).to_dict()
    return Choice(answer, marked, {**choice, "spec": spec}, _comparisons(marked, reference))


def _better(one: Candidate, other: Candidate) -> bool:
    """Whether one is no larger and no worse, and one of the two truly; errors below RESOLVED are all the same."""
    errors = [max(RESOLVED, c.relative_error) for c in (one, other)]
    no_worse = one.num_parameters <= other.num_parameters and errors[0] <= errors[1]
    return no_worse and (one.num_parameters < other.num_parameters or errors[0] < errors[1])


def _reference(loras: Sequence[Candidate], answer: Answer) -> tuple[Candidate, str]:
    """The LoRA that the others are compared with, and why that one.

    The first that has the median rank of a weight, or that is within 1 % at a lower one; else the largest. Those that
    are larger than the weights are not looked at, where there are others.
    """
    rule, ranks = answer.typical
    small = [c for c in loras if c.share < 1] or loras
    by_error = next((c for c in small if c.relative_error <= EXACT), None)
    by_rank = next((c for c in small if ranks.median is not None and c.rank >= ranks.median), None)
    named, median = f"the median rank {RULE_WORDS[rule]}", rank_words(ranks.median, ranks.computed)
    if by_error and (by_rank is None or by_error.rank < by_rank.rank):
        return by_error, f", the first tried that is within {percent(EXACT)}"
    if by_rank and by_rank.rank == ranks.median:
        return by_rank, f": {named} is {median}"
    if by_rank:
        return by_rank, f", the first tried that is no less than {named}, {median}"
    smaller = "" if small[-1] == loras[-1] else " that is smaller than the weights"
    return small[-1], f", the largest tried{smaller}: {named} is {median}"


def _choice(found: Sequence[Candidate], reference: Candidate, why: str, answer: Answer) -> dict[str, Any]:
    """The cheapest candidate that is as close as the reference, and the sentences that say so."""
    best = min(
        (c for c in found if _as_close(c, reference.relative_error)),
        key=lambda c: (c.num_parameters, round(c.relative_error, 3)),
    )
    low = answer.needed[0].share <= LOW and best.share < 1
    holds = low or best.relative_error <= CLOSE or _is_noise(best, answer)
    return {
        "label": best.label,
        "reference": reference.label,
        "rule": f"the cheapest format tried that is as close as {reference.label}{why}.",
        "reason": _reason(best, reference),
        "warning": _warning(best, answer) if holds else _no_low_rank(answer.needed[0]),
        "holds": holds,
    }


def _reason(best: Candidate, reference: Candidate) -> str:
    """What the choice costs and leaves, and what the reference does."""
    said = f"{best.label} leaves {percent(best.relative_error)} of the change's norm, "
    said += f"with {best.num_parameters:,} parameters, {dense_words(best.share)}"
    if best == reference:
        return f"{said}; no other format tried is as close with fewer."
    times = reference.num_parameters / max(1, best.num_parameters)
    return f"{said}: {times:.2g} times fewer than {reference.label}, which leaves {percent(reference.relative_error)}."


def _is_noise(best: Candidate, answer: Answer) -> bool:
    """Whether what a candidate leaves is no more than the rounding noise."""
    return answer.noise_share is not None and best.relative_error <= NOISY * answer.noise_share


def _warning(best: Candidate, answer: Answer) -> str:
    """What the choice does not hold; empty where it is close."""
    if best.relative_error <= CLOSE:
        return ""
    if _is_noise(best, answer):
        noise = percent(answer.noise_share)
        return f"What it leaves is no more than the rounding noise of the stored dtypes, up to {noise} of the change."
    return f"It is far from the change: to be within {percent(CLOSE)} takes {_size(answer.needed[0])}."


def _size(needed: Needed) -> str:
    least = "at least " if needed.at_least else ""
    return f"{least}{needed.num_parameters:,} parameters, {dense_words(needed.share)}"


def _no_low_rank(needed: Needed) -> str:
    """That there is none, and what to do."""
    return (
        f"This change has no low rank: to be within {percent(CLOSE)} of it takes {_size(needed)}. Keep the tuned"
        " weights, or train an adapter on the base."
    )


def _rule(label: str, found: Sequence[Candidate], stack: Tried) -> Rule:
    """What a candidate is on one stack, as a user would write it."""
    best = next(c for c in found if c.label == label)
    return Rule(
        **{"name": stack.name, "targets": stack.paths, "rank": best.rank, **FAMILIES[best.preset].rule(stack.axes)}
    )


def _as_close(one: Candidate, error: float) -> bool:
    return one.relative_error <= max(RESOLVED, error * (1 + NEAR))


def _comparisons(found: Sequence[Candidate], reference: Candidate) -> dict[str, Any]:
    """The cheapest of every format at equal error, and the closest at equal budget, of some LoRA each."""
    loras = [c for c in found if c.preset == "lora"]
    near = [c for c in loras if c.rank in (1, reference.rank, 4 * reference.rank)]
    budgets = sorted({n for c in near if c.rank <= reference.rank for n in (c.num_parameters // 10, c.num_parameters)})
    at_error = [{"relative_error": c.relative_error, "label": c.label, **_cheapest(found, c)} for c in near]
    at_budget = [{"max_parameters": n, **row} for n in budgets if (row := _closest(found, n))["rows"]]
    return {"at_error": at_error, "at_budget": at_budget}


def _cheapest(found: Sequence[Candidate], reference: Candidate) -> dict[str, Any]:
    good = [c for c in found if _as_close(c, reference.relative_error)]
    best = [min(rows, key=lambda c: c.num_parameters) for rows in _by_format(good)]
    rows = [{key: getattr(c, key) for key in ("label", "num_parameters", "share")} for c in best]
    return {"rows": rows, "unreached": _missing(found, best)}


def _closest(found: Sequence[Candidate], budget: int) -> dict[str, Any]:
    good = [c for c in found if c.num_parameters <= budget]
    best = [min(rows, key=lambda c: c.relative_error) for rows in _by_format(good)]
    rows = [{key: getattr(c, key) for key in ("label", "relative_error")} for c in best]
    return {"rows": rows, "unreached": _missing(found, best)}


def _by_format(found: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    for key in FAMILIES:
        rows = [c for c in found if c.preset == key]
        if rows:
            yield rows


def _missing(found: Sequence[Candidate], best: Sequence[Candidate]) -> list[str]:
    """The formats that were tried, and of which none is among the best."""
    there = {c.preset for c in best}
    return [FAMILIES[key].label for key in FAMILIES if key not in there and any(c.preset == key for c in found)]
