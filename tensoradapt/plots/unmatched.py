"""What only one of two sides holds, in the words that every output has of it.

Invariant: no number and no word of a comparison is of these tensors, so they are counted and named beside each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from tensoradapt.plots.words import brief_name

SHOWN = 3  # names of each side
LOOKED_AT = 200  # names of a side among which one like another's is looked for
NEAR = 0.7  # how alike two names are for that
HEAD = (
    "What is only in the tuned side, a new head say, is in no number here and in no extracted adapter: take it from "
    "the tuned model, or train an adapter together with it (train=['classifier'])."
)


def unmatched(only_base: Sequence[str], only_tuned: Sequence[str]) -> Iterator[str]:
    """One line for the tensors that one side lacks, with names: `3 only in the base, 2 only in the tuned side: ...`."""
    sides = [(names, words) for names, words in ((only_base, "base"), (only_tuned, "tuned side")) if names]
    if sides:
        counts = ", ".join(f"{len(names):,} only in the {words}" for names, words in sides)
        yield f"{counts}: {'; '.join(_shown(names) for names, _ in sides)}"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(brief_name(name) for name in names[:SHOWN]) + more


def advice(only_base: Sequence[str], only_tuned: Sequence[str]) -> Iterator[str]:
    """What to do about them: names that may be of one weight, and what is new in the tuned side."""
    pair = alike(only_base, only_tuned)
    if pair:
        yield (
            f"{pair[0]} in the base may be {pair[1]} in the tuned side: where they are one weight its change is in no "
            "number here; give both sides under one model's names, or prefix= (--prefix)."
        )
    elif only_tuned:
        yield HEAD


def alike(names: Sequence[str], others: Sequence[str]) -> tuple[str, str] | None:
    """A name and the nearest of the others, where one is near."""
    for name in names[:LOOKED_AT]:
        close = get_close_matches(name, others[:LOOKED_AT], n=1, cutoff=NEAR)
        if close:
            return name, close[0]
    return None


def apart(match: Mapping[str, Sequence[str]]) -> bool:
    """Whether each of the two sides holds what the other has not: nobody knows what of it changed."""
    return bool(match["only_base"]) and bool(match["only_tuned"])


def equal(only_base: Sequence[str], only_tuned: Sequence[str]) -> str:
    """What to say where nothing differs: of all, or of what both sides hold."""
    if only_base or only_tuned:
        return "what both checkpoints hold is equal; what only one of them holds is not compared"
    return "the checkpoints are equal"
