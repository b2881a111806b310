"""What presets share: folds of heads, and of both sides."""

from __future__ import annotations

from collections.abc import Mapping

from tensoradapt.errors import SpecError
from tensoradapt.spec import Fold

Folds = Mapping[str, Fold] | Fold


HEADS: dict[str, Fold] = {"out": ["head", "head_dim"]}


def both_sides(folds: Folds) -> dict[str, Fold]:
    """Folds of both sides, from a mapping or from one fold for both."""
    if not isinstance(folds, Mapping):
        return {"out": folds, "in": folds}
    if set(folds) != {"out", "in"}:
        raise SpecError("folds name both sides", got=sorted(folds), expected="out and in")
    return dict(folds)


def count_of(fold: Fold) -> int:
    """The number of axes a fold makes, known before any size is."""
    if not isinstance(fold, str):
        return len(fold)
    return 2 if fold.startswith("factor") else int(fold.partition(":")[2] or 3)
