"""The answer of a report in sentences, and the account of its tensors: the same words in text and on the page.

Invariant: every number comes from the report; a bound is said to be one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tensoradapt.plots.unmatched import advice, apart, unmatched
from tensoradapt.plots.words import percent, some

RULE_WORDS = {
    "noise": "above the rounding noise",
    "exact": "above float32's own rounding",
    "energy_0.95": "for 95% of the energy",
}
KIND_WORDS = {
    "layers": "weights in the layers",
    "embeddings": "embeddings",
    "outside": "other weights",
    "vectors": "biases and norms",
    "other": "tensors that are no weights",
    "untargeted": "weights beside the targets",
}
QUESTION = "What rank is it?"
NONE = "no adapter."
UNREAD = "not finite"  # how the reason begins for which a weight was left out while reading
NOISE_SHOWN = 0.01  # the share of the change from which on rounding noise is spoken of


def rank_words(rank: int | None, computed: int | None) -> str:
    """A rank, or what it is above."""
    return f"more than {computed:,}" if rank is None else f"{rank:,}"


def dense_words(share: float) -> str:
    """Parameters beside the entries of the weights that they stand for."""
    return f"{percent(share)} of the dense change" if share < 1 else f"{share:.1f} times the dense change"


def dense_part(share: float) -> str:
    """The same in a table: a share, or how many times the weights' entries."""
    return percent(share) if share < 1 else f"{share:.1f} times"


def answer_words(report: Mapping[str, Any]) -> str:
    """The first sentence: what rank the change has."""
    answer = report.get("answer")
    if not answer:
        return _no_change(report)
    said = ", ".join(_ranks(ranks, RULE_WORDS[rule]) for rule, ranks in answer["ranks"].items())
    many = f"{some(answer['weights'], 'weight')}{' in the layers' if answer['layers'] else ''}"
    return f"{said}: {'of ' if answer['weights'] == 1 else 'medians of '}{many}."


def _no_change(report: Mapping[str, Any]) -> str:
    """Where no weight differs that was compared: whether that is all there is to say."""
    match = report["match"]
    if not report["sites"]:
        return "no weight was compared."
    if match["only_base"] or match["only_tuned"]:
        lacking = [key for key in ("only_base", "only_tuned") if match[key]]
        many = some(sum(len(match[key]) for key in lacking), "tensor")
        return f"not known: the weights that both sides hold are equal, and {many} of one side alone were not compared."
    unread = [name for name, reason in match["refused"].items() if reason.startswith(UNREAD)]
    if unread:
        return f"not known: the weights that were read are equal, and {some(len(unread), 'weight')} could not be read."
    return "0: no weight differs."


def _ranks(ranks: Mapping[str, Any], words: str) -> str:
    low, middle, high = (rank_words(ranks[key], ranks["computed"]) for key in ("lowest", "median", "highest"))
    return f"{middle} {words}" + (f" ({low} to {high})" if low != high else "")


def needed_words(needed: Mapping[str, Any]) -> str:
    """What an adapter takes for an error: the smallest one, or a bound where none that was tried is within it."""
    error, share = f"{percent(needed['relative_error'])} error", needed["share"]
    least = "at least " if needed["at_least"] else ""
    name = "LoRA" if needed["at_least"] else needed["label"]
    if share >= 1:
        return f"{error}: this change has no low rank: {name} takes {least}{share:.1f} times its dense size"
    size = f"{needed['num_parameters']:,} parameters, {dense_words(share)}"
    if needed["at_least"]:
        return f"{error}: no format tried reaches it; LoRA takes at least {size}"
    return f"{error}: {name}, {size}"


def answer_lines(report: Mapping[str, Any]) -> list[str]:
    """What follows the first sentence: the parameters needed for each error, and the noise where there is some."""
    answer = report.get("answer")
    beside = _beside(report["match"]) if apart(report["match"]) else []
    if not answer:
        return beside
    noise = answer["noise_share"]
    lines = beside + [needed_words(needed) for needed in answer["needed"]]
    if noise is not None and noise >= NOISE_SHOWN:
        lines += [f"up to {percent(noise)} of the change's norm is rounding noise of the stored dtypes"]
    beside = sum(bool(row["norm"]) for row in report["sites"].values()) - answer["weights"]
    if beside > 0:
        lines += [
            f"these numbers are of the layers; an extraction without targets takes all {answer['weights'] + beside:,} "
            "weights that differ, and its parameters and error are over these"
        ]
    return lines


def kind_rows(change: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The tensors of both sides by kind: how many, how many differ, and their share of the squared change."""
    for kind, row in change["kinds"].items():
        name = KIND_WORDS[kind]
        several = row["weights"] not in (0, row["tensors"])
        name = f"{row['weights']:,} {name}" if several else name
        share = "" if row["share"] is None else percent(row["share"])
        yield name, f"{row['tensors']:,}", f"{row['differing']:,}", share


def sides_words(report: Mapping[str, Any]) -> str:
    """What was compared: two sides, or a set of adapters."""
    if report["kind"] == "adapters":
        return f"{report['tuned'] or 'adapters'}: {report['base'] or 'a set'}"
    return f"{report['base'] or 'base'} -> {report['tuned'] or 'tuned'}"


def one_sided(match: Mapping[str, Any]) -> list[str]:
    """What only one side holds, in one sentence (where both lack something it stands by the answer), and what to do."""
    return [*([] if apart(match) else _beside(match)), *advice(match["only_base"], match["only_tuned"])]


def _beside(match: Mapping[str, Any]) -> list[str]:
    return [f"not compared: {line}" for line in unmatched(match["only_base"], match["only_tuned"])]


def proposal_words(choice: Mapping[str, Any]) -> list[str]:
    """The proposal in sentences: the candidate with its rule, or that there is none, and what the rule would give."""
    rule = [f"The rule: {choice['rule']}"] if choice.get("rule") else []
    warning = [choice["warning"]] if choice.get("warning") else []
    if choice.get("holds", True):
        return [choice["reason"], *warning, *rule]
    return [NONE, *warning, f"By the rule it would be this: {choice['reason']}", *rule]
