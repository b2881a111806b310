"""What an extraction refuses to be silent of: weights that only one of the two sides holds.

Invariant: a weight that a target means is in both sides, and an extraction of nothing says what it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensoradapt.errors import FileError, SiteError
from tensoradapt.extract.whole import Whole
from tensoradapt.io.matching import Match
from tensoradapt.plots.unmatched import alike, unmatched
from tensoradapt.presets import expand
from tensoradapt.spec import SETS, Rule, Spec
from tensoradapt.targets import matches

SHOWN = 3  # names in a hint
UNDER_ONE = "give both sides under the names of one model, as save_pretrained writes them; or prefix= (--prefix)"


def check_targets(spec: Spec, match: Match) -> None:
    """Raise SiteError where a rule's targets mean weights that only one side holds."""
    for rule in expand(spec).rules:
        base, tuned = (_meant(rule, names) for names in match.lone)
        if base or tuned:
            names = [name.removesuffix(".weight") for name in (*base, *tuned)]
            left = ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
            raise SiteError(
                f"targets mean {len(names)} weight{'s' * (len(names) > 1)} that only one side holds",
                got=next(unmatched(base, tuned)),
                expected="weights of both sides",
                hint=f"{_near(match, base, tuned)}exclude=[{left}] leaves them out",
            )


def _meant(rule: Rule, names: Sequence[str]) -> list[str]:
    """The names that literal targets of a rule match and its excludes do not."""
    targets = [target for target in rule.targets if target not in SETS]
    paths = {name: name.removesuffix(".weight") for name in names}
    mine = [name for name, path in paths.items() if any(matches(target, path) for target in targets)]
    return [name for name in mine if not any(matches(target, paths[name]) for target in rule.exclude)]


def _near(match: Match, base: Sequence[str], tuned: Sequence[str]) -> str:
    """Which weight of the other side may be meant, in words."""
    pair = alike(base, match.lone[1]) if base else alike(tuned, match.lone[0])
    if pair is None:
        return ""
    here, there = ("base", "tuned side") if base else ("tuned side", "base")
    return f"{pair[0]} of the {here} may be {pair[1]} of the {there}: {UNDER_ONE}; "


def check_seen(whole: Whole, match: Match) -> None:
    """Raise FileError where nothing that both sides hold differs and each has weights that the other lacks."""
    if whole.names or not all(match.lone):
        return
    pair = alike(*match.lone)
    raise FileError(
        "what both sides hold is equal, and each has weights that the other lacks: nothing is known of their change",
        got=next(unmatched(*match.lone)),
        hint=(f"{pair[0]} in the base may be {pair[1]} in the tuned side: " if pair else "") + UNDER_ONE,
    )
