"""What presets share: default targets, and folds of both sides."""

from __future__ import annotations

from collections.abc import Mapping

from tensoradapt.errors import SpecError
from tensoradapt.spec import Fold

Folds = Mapping[str, Fold] | Fold


HEADS: dict[str, Fold] = {"out": ["head", "head_dim"]}


QUERY_VALUE = (r"re:(.*\.)?(query|value|q_proj|v_proj|q_lin|v_lin|q|v)",)


ATTENTION = (
    r"re:(.*\.)?(query|key|value|q_proj|k_proj|v_proj|o_proj|q_lin|k_lin|v_lin|out_lin|q|k|v|o|attention\.output\.dense)",
)


QKV = (r"re:(.*\.)?(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin|q|k|v)",)


FEED_FORWARD = (
    r"re:(.*\.)?(output\.dense|intermediate\.dense|o_proj|up_proj|down_proj|gate_proj|fc1|fc2|proj|lin1|lin2|out_lin|wi|wo|o)",
)


BLOCK = (QKV[0], FEED_FORWARD[0])


CONVOLUTIONS = (r"re:(.*\.)?[^.]*(conv|downsample|shortcut)[^.]*(\.\d+)?",)


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
