"""Numbers and names as readers meet them: in captions, tables and labels.

Invariant: a name from a file is shown as it is, but for characters that no page can show and for a middle left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from tensoradapt.plots.labels import extent

CUT, LONGEST = "…", 200
KINDS = {"checkpoints": "change", "adapters": "delta"}
RULES = {
    "noise": "singular values above the rounding noise",
    "gavish_donoho": "rank by Gavish and Donoho's threshold",
    "marchenko_pastur": "singular values above the Marchenko-Pastur edge",
}


def plain(name: object) -> str:
    """A name in one line, without characters that cannot be drawn or written to an SVG."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(name))


def fitted(name: object, width: float, size: float) -> str:
    """A name that is at most `width` millimetres wide in letters of `size` points: the middle makes room."""
    text = plain(name)
    if len(text) <= LONGEST and extent(text, size)[0] <= width:
        return text
    kept = bisect_right(range(min(len(text), LONGEST)), width, key=lambda n: extent(_cut(text, n), size)[0])
    return _cut(text, max(2, kept - 1))


def _cut(text: str, kept: int) -> str:
    """The two ends of a text, more of the last."""
    tail = kept // 2 + kept // 8
    return text[: kept - tail] + CUT + text[len(text) - tail :]


def percent(share: float | None) -> str:
    """A share in per cent, to three figures: `12.3%`."""
    if share is None:
        return "unknown"
    value = 100 * share
    if 0 < value < 1e-4:
        return "<0.0001%"
    return f"{value:.3g}%" if abs(value) < 999.5 else f"{value:,.0f}%"


def figures(number: float | None, digits: int = 3) -> str:
    """A number to some significant figures; a dash where there is none."""
    return "–" if number is None else f"{number:,}" if float(number).is_integer() else f"{number:.{digits}g}"


def some(number: int, noun: str) -> str:
    """`1 weight`, `72 weights`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def brief_name(name: object, letters: int = 64) -> str:
    """A name for a sentence: of a long one the two ends."""
    text = plain(name)
    return text if len(text) <= letters else f"{text[: letters // 2 - 1]}{CUT}{text[-letters // 2 :]}"


def listed(names: Sequence[object], limit: int = 5) -> str:
    """`a, b and 3 more`."""
    shown = [brief_name(name) for name in names[:limit]]
    if len(names) > limit:
        return f"{', '.join(shown)} and {len(names) - limit:,} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def rule_words(rule: str) -> str:
    """What a rule for the rank counts: `noise`, `energy_0.95`."""
    share = _energy(rule)
    return f"rank that holds {share} of the energy" if share else RULES.get(rule, f"rank ({rule})")


def rule_label(rule: str) -> str:
    """The same for an axis."""
    share = _energy(rule)
    return f"rank, {share} of energy" if share else f"rank, {rule}"


def _energy(rule: str) -> str:
    """The share of the energy that a rule asks for, in percent; empty for other rules."""
    share = rule.removeprefix("energy_")
    return percent(float(share)) if share != rule else ""


def has_noise(report: Mapping[str, Any]) -> bool:
    """Whether any weight has rounding noise: float32 weights have none."""
    return any(site["noise"]["edge"] for site in report["sites"].values())


def at_most(ranks: Sequence[int | None]) -> tuple[int, int] | None:
    """A rank that most of some weights stay within, and how many do; None where no rank is known."""
    known = sorted(rank for rank in ranks if rank is not None)
    if not known:
        return None
    rank = known[min(len(known) - 1, int(0.85 * len(known)))]
    return rank, sum(found <= rank for found in known)


def proposed(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The report's choice, where it proposes one: none where no low rank holds the change."""
    choice: Mapping[str, Any] | None = report["choice"]
    return choice if choice and choice.get("holds", True) else None
