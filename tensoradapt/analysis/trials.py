"""Trials: every format on one stack at every rank, some at a time where the stack is small.

Invariant: a trial computes with one thread where others run beside it, so that what it finds depends on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tensoradapt.analysis.candidates import FAMILIES, RANKS, Stacked, Trial, Tried
from tensoradapt.linalg import pooled

SMALL = 1 << 23  # entries of a stack that several formats are tried on at a time


def tried(stack: Stacked, ranks: Sequence[int] = RANKS, tell: Callable[[str], None] = lambda _: None) -> Tried:
    """Every format on one stack, at every rank; `tell` is called with what begins."""
    pairs = {f"{family.label} r={rank}": (key, rank) for key, family in FAMILIES.items() for rank in ranks}
    tasks = {name: partial(FAMILIES[key].trial, stack, rank) for name, (key, rank) in pairs.items()}
    if _is_small(stack):
        made = pooled(tasks, tell)
    else:
        made = {name: _told(task, name, tell) for name, task in tasks.items()}
    trials = {pairs[name]: trial for name, trial in made.items() if trial is not None}
    dense = len(stack.paths) * stack.sizes["out"] * stack.sizes["in"]
    return Tried(stack.name, stack.paths, stack.axes, dense, stack.norms, trials)


def _is_small(stack: Stacked) -> bool:
    largest = stack.core if stack.deltas is None else stack.deltas
    return largest.device.type == "cpu" and largest.numel() <= SMALL


def _told(task: Callable[[], Trial | None], name: str, tell: Callable[[str], None]) -> Trial | None:
    tell(name)
    return task()
